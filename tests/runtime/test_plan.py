"""Plans: what is counted on meta tensors against what PyTorch counts and frees on real ones, and the arithmetic on it."""

from __future__ import annotations

import itertools
import json
import re
from typing import get_args

import attrs
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from sftk.cli import main
from sftk.errors import SpecError
from sftk.functional.cache import KVCache
from sftk.functional.layout import Layout
from sftk.models.config import WanConfig, preset
from sftk.models.wan import WanModel
from sftk.runtime.activations import Checkpoint
from sftk.runtime.parallelize import parallelize
from sftk.runtime.plan import Planner, plan_stage
from sftk.runtime.plan_advice import advise
from sftk.runtime.plan_blocks import Active, measure_blocks
from sftk.runtime.plan_pass import pass_stage
from sftk.runtime.plan_rates import GIB
from sftk.runtime.plan_report import describe_plan
from sftk.runtime.plan_trace import Trace
from sftk.runtime.sequence import SequenceGroup, share_sequence
from sftk.spec.recipe import load_recipe

BENCHMARK = "benchmarks/dmd_1.3b.yaml"
FULL = ("models.generator.checkpoint=full", "models.fake_score.checkpoint=full", "models.generator.half_copy=false")
CONFIG = WanConfig(dim=64, ffn_dim=160, num_heads=2, num_layers=3, in_dim=4, out_dim=4, freq_dim=32, text_dim=24, text_len=8)
FRAMES, ROWS, WIDTH, TEXT = 6, 8, 12, 8
TOKENS = FRAMES * ROWS * WIDTH // 4


def inputs(device="meta", frames=FRAMES):
    sizes = ((1, frames, 4, ROWS, WIDTH), (1, frames), (1, TEXT, CONFIG.text_dim))
    return [torch.empty(size, device=device) for size in sizes]


def traced(checkpoint="none", layout=None, measured=True, sequence=1):
    """A training pass of one model: its trace."""
    active = Active(Trace())
    with torch.device("meta"):
        model = share_sequence(WanModel(CONFIG), SequenceGroup(name="", rank=0, degree=sequence))
    parallelize(model, checkpoint=checkpoint)
    if measured:
        measure_blocks(model, active)
    active.trace.ignore(model)
    tensors = inputs()
    with active.trace as trace:
        model(*tensors, layout=layout)[0].sum().backward()
    return trace


def forward_flops():
    """By hand: every product of one pass, module by module."""
    d, f, text = CONFIG.dim, CONFIG.ffn_dim, TEXT
    block = 4 * TOKENS * d * d + 2 * TOKENS * d * d + 2 * text * d * d + 2 * TOKENS * d * f
    ends = TOKENS * 16 * d * 2 + text * (CONFIG.text_dim * d + d * d) + FRAMES * (CONFIG.freq_dim * d + d * d + 6 * d * d)
    attention = 4 * d * (TOKENS**2 + TOKENS * text)
    return 2 * (CONFIG.num_layers * block + ends), CONFIG.num_layers * attention


def test_operations_are_those_of_the_formulas():
    gemm, attention = forward_flops()
    trace = traced()
    assert trace.work.attention == attention
    assert trace.work.attention_backward == 2.5 * attention
    # Backward takes two products for each, but none for what the inputs of the model would get.
    first = 2 * (TOKENS * 16 * CONFIG.dim + TEXT * CONFIG.text_dim * CONFIG.dim + FRAMES * CONFIG.freq_dim * CONFIG.dim)
    assert trace.work.gemm == 3 * gemm - first


def test_operations_are_those_that_pytorch_counts():
    model = WanModel(CONFIG, backend="math")
    with FlopCounterMode(display=False) as counter:
        model(*(torch.zeros_like(t, device="cpu") for t in inputs()))[0].sum().backward()
    trace = traced()
    # Unfused attention has two products forward and four backward; a fused one computes the scores again.
    assert counter.get_total_flops() == trace.work.gemm + trace.work.attention * 3


def test_a_checkpoint_computes_blocks_twice_and_keeps_less():
    none, full = traced("none"), traced("full")
    assert full.work.attention == 2 * none.work.attention
    assert full.work.attention_backward == none.work.attention_backward
    assert full.peak(0.0) < 0.6 * none.peak(0.0)


def test_selective_checkpoints_keep_attention_and_what_narrows():
    none, full, selective = traced("none"), traced("full"), traced("selective")
    assert selective.work.attention == none.work.attention
    # The feed-forward layer's second product is not computed again.
    assert full.work.gemm - selective.work.gemm == CONFIG.num_layers * 2 * TOKENS * CONFIG.dim * CONFIG.ffn_dim
    assert full.peak(0.0) < selective.peak(0.0) < 0.75 * none.peak(0.0)


def test_checkpoints_that_keep_products_compute_none_again():
    none, full, selective, products = (traced(kind) for kind in ("none", "full", "selective", "products"))
    assert (products.work.gemm, products.work.attention) == (none.work.gemm, none.work.attention)
    assert products.work.moved > 1.1 * none.work.moved
    # q, k, v, o and the text's q, o, k and v, and the wide activation; the block whose backward pass runs has them in any case.
    more = 4 * (TOKENS * (6 * CONFIG.dim + CONFIG.ffn_dim) + 2 * TEXT * CONFIG.dim)
    assert products.peak(0.0) - selective.peak(0.0) == (CONFIG.num_layers - 1) * more
    peaks = [trace.peak(0.0) for trace in (none, products, selective, full)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


@pytest.mark.parametrize("checkpoint", get_args(Checkpoint))
def test_repeated_blocks_cost_what_all_blocks_cost(checkpoint):
    whole, repeated = traced(checkpoint, measured=False), traced(checkpoint)
    assert repeated.work.flops == whole.work.flops
    assert repeated.work.moved == pytest.approx(whole.work.moved, rel=0.05)
    gradients = 4 * sum(p.numel() for p in WanModel(CONFIG).blocks[0].parameters())  # a block's are counted from its beginning
    assert repeated.peak() == pytest.approx(whole.peak() + gradients / 2, abs=gradients / 2 + 0.1 * whole.peak())


def test_weights_are_no_activations():
    """In half precision no copies are made of them, and each block's views of its own are nothing that it keeps."""
    active = Active(Trace())
    with torch.device("meta"):
        model = parallelize(WanModel(CONFIG).to(torch.bfloat16), checkpoint="full")
    measure_blocks(model, active)
    active.trace.ignore(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with active.trace as trace:
        out = model(*(t.to(torch.bfloat16) for t in inputs(frames=1)))[0]
        assert trace.live < weights / 2
        out.sum().backward()
    assert trace.gradient_bytes == weights
    assert trace.peak(0.0) < weights / 2


def test_everything_is_freed_in_the_end():
    trace = traced("full")
    assert trace.live == 0
    assert trace.gradient_bytes == 4 * sum(p.numel() for p in WanModel(CONFIG).parameters())


def test_a_layout_computes_only_pairs_that_see_each_other():
    layout = Layout(kind="block_causal", blocks=(2, 2, 2))
    full, causal = traced(), traced(layout=layout)
    cross = CONFIG.num_layers * 4 * CONFIG.dim * TOKENS * TEXT
    share = float(layout.frame_mask().float().mean())
    assert causal.work.attention - cross == pytest.approx(share * (full.work.attention - cross))


def test_ranks_that_share_a_sequence_halve_its_work_and_send_heads():
    alone, shared = traced(), traced(sequence=2)
    assert shared.work.attention == alone.work.attention / 2
    assert shared.work.attention_backward == alone.work.attention_backward / 2
    # q, k, v there and the result back, in both directions: half of a rank's elements leave it. Then its part of the flow.
    here = TOKENS // 2
    block = 4 * here * CONFIG.dim // 2
    assert shared.work.sent == 4 * (2 * CONFIG.num_layers * block + here * 16)
    assert alone.work.sent == 0
    assert 0.4 < shared.peak(0.0) / alone.peak(0.0) < 0.65


def test_what_blocks_return_is_what_they_would():
    with torch.device("meta"):
        plain, measured = WanModel(CONFIG), WanModel(CONFIG)
    measure_blocks(measured, Active(Trace()))
    tensors = inputs(frames=2)
    for model in (plain, measured):
        with torch.no_grad():
            model_out = model(*tensors, cache=KVCache(), features_at=(0, -1))
        found = [model_out[0].shape, [[t.shape for t in layer] for layer in model_out[1]], [t.shape for t in model_out[2]]]
        assert found[0] == tensors[0].shape
        if model is plain:
            expected = found
    assert found == expected


@pytest.fixture(scope="module")
def benchmark_pass():
    return pass_stage(load_recipe(BENCHMARK, FULL)[0])


def test_work_of_a_cycle_is_that_of_the_published_code(benchmark_pass):
    """Counted apart for that code: 11,810 TFLOP as it is, 10,465 when nothing is done twice."""
    generator, critic = benchmark_pass.phases
    flops, again = (
        sum(times * getattr(phase.work, name) for times, phase in ((1, generator), (5, critic))) / 1e12
        for name in ("flops", "attention_again")
    )
    # We have no commit after the last block; with checkpoints that keep attention, nothing but linear layers is computed again.
    assert flops - again == pytest.approx(10465, rel=0.001)
    config = preset("1.3b")
    tokens, context = 3 * 60 * 104 // 4, 21 * 60 * 104 // 4
    linear = tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    commit = config.num_layers * (2 * linear + 4 * config.dim * tokens * (context + config.text_len)) / 1e12
    assert flops + 6 * commit == pytest.approx(11810, rel=0.003)
    for phase, steps in ((generator, 4), (critic, 4)):
        more = {round((late.flops - early.flops) / 1e12) for early, late in itertools.pairwise(phase.exits)}
        assert (len(phase.exits), more) == (steps, {198})  # one more call of each block


def test_peak_and_time_of_the_compiled_benchmark():
    """Measured on one H200 with FlashAttention 4: 60.3 GiB; 3.71 s and 2.91 s, means over the exit steps."""
    plan = plan_stage(load_recipe(BENCHMARK, ["models.generator.backend=flash"])[0])
    assert plan.peak / GIB == pytest.approx(60.3, rel=0.02)
    assert [phase.seconds for phase in plan.phases] == pytest.approx([3.71, 2.91], rel=0.05)


def test_peak_and_work_of_the_benchmark(benchmark_pass, monkeypatch):
    (stage,) = load_recipe(BENCHMARK, [*FULL, "compile=false"])
    monkeypatch.setattr("sftk.runtime.plan.pass_stage", lambda local, sharded: benchmark_pass)
    plan = plan_stage(stage)
    generator, critic = plan.phases
    # Measured on one H100, eager, when a cache grew by copies and had no room for the last block: 47.9 GiB.
    assert plan.peak / GIB == pytest.approx(49.6, rel=0.02)
    # The arithmetic of a cycle, counted apart for the published code: 11,810 TFLOP, with a context commit after the last block.
    assert generator.tflop + 5 * critic.tflop == pytest.approx(11810, rel=0.05)
    assert plan.parameters["generator"] == 1_418_996_800
    assert plan.fits
    # Measured, eager: 13.7 s for one step of both.
    assert generator.seconds + critic.seconds == pytest.approx(13.7, rel=0.15)


@pytest.fixture(scope="module")
def small():
    """One meta pass of a small DMD recipe with a long context."""
    size = "{dim: 96, ffn_dim: 384, num_heads: 3, num_layers: 4, in_dim: 4, out_dim: 4, text_dim: 32, text_len: 4}"
    changes = [f"models.{role}.size={size}" for role in ("generator", "real_score", "fake_score")]
    changes += [f"models.{role}.weights=null" for role in ("generator", "real_score", "fake_score")]
    return load_recipe("recipes/digits/dmd.yaml", [*changes, "batch.global=8", "batch.per_rank=1"])[0]


def test_calls_are_the_mean_over_exit_steps(small):
    generator, critic = pass_stage(small).phases
    # 7 blocks: 0 to 3 steps before the exit step (1.5), the exit step forward and backward, and 6 commits.
    assert generator.calls["generator"] == 7 * (1.5 + 2) + 6
    assert critic.calls == {"generator": 7 * 2.5 + 6, "fake_score": 2.0}


@pytest.fixture(scope="module")
def planner():
    """Passes are made once for all tests."""
    return Planner("h100")


def with_parallel(stage, **changes):
    return attrs.evolve(stage, recipe=attrs.evolve(stage.recipe, parallel=attrs.evolve(stage.recipe.parallel, **changes)))


def test_sharding_divides_what_it_shards(small, planner):
    whole = planner.plan(with_parallel(small, shard=1), 8)
    parts = planner.plan(with_parallel(small, shard="all"), 8)
    nodes = Planner("h100", 4, planner.passes).plan(with_parallel(small, shard="node"), 8)
    trained = whole.parameters["fake_score"]
    for role in whole.roles:
        assert whole.roles[role].weights == 4 * whole.parameters[role]
        assert parts.roles[role].weights == pytest.approx(whole.roles[role].weights / 8, rel=0.03)  # rows fill up
        assert nodes.roles[role].weights == pytest.approx(whole.roles[role].weights / 4, rel=0.03)
    assert whole.roles["fake_score"].optimizer == 8 * trained
    assert parts.roles["fake_score"].optimizer == 2 * parts.roles["fake_score"].weights
    critic = parts.phases[1]
    calls = {"generator": 7 * 2.5 + 6, "fake_score": 2.0}
    gathered = 4 * 7 / 8 * sum(calls[role] * parts.parameters[role] for role in calls)
    assert critic.communication == pytest.approx(gathered + 7 / 8 * 4 * trained, rel=0.03)
    assert whole.phases[1].communication == pytest.approx(2 * 7 / 8 * 4 * trained)
    assert [{row.kind for row in plan.phases[1].traffic} for plan in (whole, parts, nodes)] == [
        {"all_reduce"}, {"all_gather", "reduce_scatter"}, {"all_gather", "reduce_scatter", "all_reduce"}
    ]  # fmt: skip
    across = [sum(row.across for row in plan.phases[1].traffic if row.kind != "all_reduce") for plan in (parts, nodes)]
    assert across == [0, 0], "8 GPUs are one node, and of two nodes each has its copy"


def test_what_a_role_says_for_itself_is_planned_so(small, planner):
    mine = attrs.evolve(small.recipe.models["real_score"].parallel, shard=1, offload=True)
    models = small.recipe.models | {"real_score": attrs.evolve(small.recipe.models["real_score"], parallel=mine)}
    (plain, changed) = (
        planner.plan(stage, 8) for stage in (small, attrs.evolve(small, recipe=attrs.evolve(small.recipe, models=models)))
    )
    assert changed.host == 4 * changed.parameters["real_score"]
    assert changed.roles["generator"] == plain.roles["generator"]
    assert changed.on_device("weights") == plain.on_device("weights") - plain.roles["real_score"].weights
    small_state = {role: attrs.evolve(one, use="adamw_8bit") for role, one in small.recipe.optimizers.items()}
    eight = planner.plan(attrs.evolve(small, recipe=attrs.evolve(small.recipe, optimizers=small_state)), 8)
    assert eight.on_device("optimizer") == plain.on_device("optimizer") / 4


def test_whole_gradients_between_micro_batches_are_counted(small, planner):
    batch = attrs.evolve(small.recipe.batch, global_=16)
    longer = attrs.evolve(small, recipe=attrs.evolve(small.recipe, batch=batch))
    whole, scattered = (planner.plan(with_parallel(longer, accumulate=how), 8) for how in ("whole", "sharded"))
    assert whole.phases[1].gradients == 4 * whole.parameters["fake_score"]
    assert scattered.phases[1].gradients == scattered.roles["fake_score"].weights
    assert whole.phases[1].communication < scattered.phases[1].communication


def test_a_window_shrinks_the_context(small):
    narrow = [f"phases.{phase}.with.window=6" for phase in ("generator", "critic")]
    windowed = load_recipe("recipes/digits/dmd.yaml", [*narrow, "batch.global=8", "batch.per_rank=1"])[0]
    plain = load_recipe("recipes/digits/dmd.yaml", ["batch.global=8", "batch.per_rank=1"])[0]
    first, second = plan_stage(windowed, gpus=8).phases[0], plan_stage(plain, gpus=8).phases[0]
    assert first.caches < second.caches / 3
    assert first.tflop < second.tflop
    assert preset("digits").num_layers == 4


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would_help():
    (stage,) = load_recipe(BENCHMARK, ["models.fake_score.checkpoint=none"])
    plan = plan_stage(stage)
    assert not plan.fits
    assert "checkpoint: selective on fake_score would make it fit" in plan.advice
    plan = plan_stage(load_recipe(BENCHMARK, FULL)[0], gpu_name="l40s")
    assert not plan.fits
    assert any(line.startswith("sharding over ") or "adamw_8bit" in line for line in plan.advice), plan.advice


@pytest.mark.slow
def test_sharing_samples_is_advised_where_one_is_too_large():
    """Sharding over 64 GPUs, and whatever else there is, leaves slightly too much: two ranks have to share a sample."""
    size = "{dim: 96, ffn_dim: 384, num_heads: 4, num_layers: 2, in_dim: 4, out_dim: 4, text_dim: 32, text_len: 4}"
    roles = ("generator", "real_score", "fake_score")
    common = [f"models.{role}.{change}" for role in roles for change in (f"size={size}", "weights=null", "checkpoint=full")]
    everything = ["models.real_score.dtype=bf16", "phases.generator.backward=replay", "batch.per_rank=1"]
    everything += [f"optimizers.{role}.use=adamw_8bit" for role in ("generator", "fake_score")]
    tried = [
        plan_stage(load_recipe("recipes/digits/dmd.yaml", [*common, *everything, f"batch.global={gpus}"])[0], gpus=gpus)
        for gpus in (16, 32, 64)
    ]
    least = min(plan.peak for plan in tried)  # rows that fill up shards count in models as small as these
    (stage,) = load_recipe("recipes/digits/dmd.yaml", [*common, "batch.global=8", "batch.per_rank=1"])
    tight = attrs.evolve(plan_stage(stage, gpus=8), budget=least * 0.95)
    first = advise(stage, tight, Planner("h100").plan)[0]
    assert re.match(r"sharding over \d+ GPUs \(.*parallel.sequence=2\), with .* would make it fit", first), first


def test_a_checkpoint_is_advised(small):
    (stage,) = load_recipe(
        "recipes/digits/df.yaml", ["models.denoiser.size={dim: 1536, ffn_dim: 8960, num_heads: 12, num_layers: 30, "
        "in_dim: 4, out_dim: 4, text_dim: 32, text_len: 4}", "models.denoiser.weights=null", "batch.global=128"]
    )  # fmt: skip
    plan = plan_stage(stage)
    assert not plan.fits
    assert plan.advice[0] == "checkpoint: selective on denoiser would make it fit"  # what computes least again


def test_a_sequence_group_shares_work_and_caches(small):
    changes = ["parallel.sequence=3", "batch.global=8", "batch.per_rank=1"]
    (stage,) = load_recipe("recipes/digits/dmd.yaml", changes)
    alone, shared = plan_stage(attrs.evolve(small), gpus=8), plan_stage(stage, gpus=24)
    assert shared.accumulation == alone.accumulation == 1
    for one, part in zip(alone.phases, shared.phases, strict=True):
        assert one.tflop / 3.5 < part.tflop < one.tflop / 2.5  # 16 tokens of a frame: 6, 5, 5
        assert one.caches / 3.1 < part.caches < one.caches / 2.5  # the text's are whole
        assert 0 < part.exchanged < part.communication
        assert one.exchanged == 0
    with pytest.raises(SpecError, match=r"sequence 3 does not divide 8 ranks @ \$\.parallel\.sequence"):
        plan_stage(stage, gpus=8)


def test_a_batch_that_does_not_split_is_an_error(small):
    with pytest.raises(SpecError, match="global 8 does not split into passes of 1 on each of 3 ranks"):
        plan_stage(small, gpus=3)


def test_the_command():
    run = CliRunner().invoke(main, ["plan", "recipes/digits/df.yaml", "--gpus", "2", "--gpu", "a100"])
    assert run.exit_code == 0, run.output
    assert "df: 2 x a100, 8 a node; 16 samples in a pass, 1 pass an update" in run.output
    assert run.output.rstrip().splitlines()[-1].strip().startswith("peak 0.")
    told = json.loads(CliRunner().invoke(main, ["plan", "recipes/digits/df.yaml", "--json"]).output)
    assert told[0]["fits"] is True
    assert told[0]["roles"]["denoiser"]["parameters"] == sum(p.numel() for p in WanModel(preset("digits")).parameters())


def test_several_counts_stand_side_by_side():
    run = CliRunner().invoke(main, ["plan", "recipes/digits/df.yaml", "--gpus", "1,16,24", "--gpus-per-node", "8"])
    assert run.exit_code == 0, run.output
    cells = {line[:42].strip(): line[42:].split() for line in run.output.splitlines()[1:-1]}
    assert cells["GPUs"] == ["1", "16"]
    assert cells["samples in a pass"] == ["32", "2"]
    assert cells["denoiser: ranks a copy"] == ["1", "16"]
    assert "  24 GPUs: global 32 does not split into passes of 1 on each of 24 ranks" in run.output.splitlines()[-1]
    told = json.loads(CliRunner().invoke(main, ["plan", "recipes/digits/df.yaml", "--gpus", "16,24", "--json"]).output)
    assert [row["gpus"] for row in told] == [16, 24]
    assert told[0]["phases"][0]["traffic"][0]["kind"] == "all_gather"
    assert "problem" in told[1]
    for wrong in ("0", "8,x", ","):
        run = CliRunner().invoke(main, ["plan", "recipes/digits/df.yaml", "--gpus", wrong])
        assert (run.exit_code, "is no number of GPUs" in run.output) == (2, True)
    run = CliRunner().invoke(main, ["plan", "recipes/digits/df.yaml", "--gpus", "24,48"])
    assert (run.exit_code, "does not split" in run.output) == (2, True)


def test_the_doctor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B").mkdir(parents=True)
    (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B" / "config.json").write_bytes(b"x" * 2**20)
    run = CliRunner().invoke(main, ["doctor", "recipes/wan-1.3b/tf.yaml"])
    users = "models.denoiser, data.with.codec.with.path, sample.text.with.path, sample.codec.with.path"
    assert f"ok      wan_models/Wan2.1-T2V-1.3B ({users}): 0.001 GiB" in run.output
    assert f"torch {torch.__version__}" in run.output
    assert "attention: sdpa, math, flex" in run.output
    run = CliRunner().invoke(main, ["doctor", "recipes/wan-1.3b/tf.yaml", "models.denoiser.backend=flash"])
    assert (run.exit_code, "asks for 'flash'" in run.output) == (1, True)
    run = CliRunner().invoke(main, ["doctor", "recipes/digits/df.yaml"])
    assert run.exit_code == 0, run.output


def test_weights_held_in_half_precision_are_counted():
    held, plain = (
        plan_stage(load_recipe(BENCHMARK, [f"models.generator.half_copy={flag}", "latents.frames=3"])[0])
        for flag in ("true", "false")
    )
    assert held.roles["generator"].weights == plain.roles["generator"].weights * 1.5
    assert held.peak - plain.peak == pytest.approx(held.roles["generator"].weights - plain.roles["generator"].weights)


LONG = "recipes/wan-1.3b/dmd_long.yaml"
FEW_FRAMES = [f"phases.{phase}.with={{steps: [1000], judged_frames: 3, window: 3}}" for phase in ("generator", "critic")]


def test_codecs_and_text_encoders_are_counted_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae, short = 126_892_531 * 4, [*FEW_FRAMES, "latents.frames=6"]
    on_gpu, on_host = (
        plan_stage(load_recipe(LONG, [*short, f"models.codec.codec.with.device={device}"])[0], advice=False)
        for device in ("auto", "cpu")
    )
    assert on_gpu.loaded["models.codec.codec"].bytes == vae
    assert on_gpu.peak - on_host.peak == vae
    assert (on_gpu.host, on_host.host) == (0, vae)
    lines = [line for line in describe_plan(on_host) if "models.codec.codec" in line]
    assert [line.split()[1:7] for line in lines] == [["126.9", "M", "1", "0.5", "GiB", "(host)"]]
    assert not plan_stage(load_recipe("recipes/wan-1.3b/tf.yaml", ["latents.frames=3"])[0], advice=False).loaded


def test_encoders_of_the_data_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    umt5 = "data.with.text={use: umt5, with: {path: wan_models/Wan2.1-T2V-1.3B}}"
    short = ["latents.frames=3", "phases.generator.with.steps=[1000]", "phases.critic.with.steps=[1000]"]
    given = "wan_models/Wan2.1-T2V-1.3B: {repo: a/b}, wan_models/self_forcing: {repo: a/b, files: [checkpoints/ode_init.pt]}"
    fetch = f"fetch={{{given}, data/images: {{own: mine}}}}"
    (stage,) = load_recipe("recipes/wan-1.3b/i2v.yaml", [*short, umt5, fetch])
    plan = plan_stage(stage, gpu_name="4090")
    assert {name: held.bytes for name, held in plan.loaded.items()} == {
        "data.with.text": 5_680_910_336 * 2, "data.with.codec": 126_892_531 * 4,
    }  # fmt: skip
    assert "data.with.text: embed the prompts before, with `sftk data embed`" in "\n".join(plan.advice)


def test_files_that_are_here_say_what_is_loaded(wan_home):
    plan = plan_stage(load_recipe("mine.yaml")[0])
    assert {name: held.on_device for name, held in plan.loaded.items()} == {"data.with.text": False}
    weights = torch.load("wan_models/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    assert plan.loaded["data.with.text"].parameters == sum(weight.numel() for weight in weights.values())
    assert plan.host == plan.loaded["data.with.text"].bytes == 2 * plan.loaded["data.with.text"].parameters
