"""A training step: phases in order, `every`, accumulation, outputs handed from phase to phase, randomness by key."""

from __future__ import annotations

import pytest
import torch

from sftk.core.transform import transform
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.step import TrainingStep
from sftk.spec.recipe import load_recipe

CPU = torch.device("cpu")


def make(recipe, *overrides):
    (stage,) = load_recipe(recipe, overrides)
    built = build_stage(stage, CPU, {})
    return built, TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe)))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, module):
    return any(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


DOUBLE = tuple(f"models.{role}.dtype=fp64" for role in ("generator", "real_score", "fake_score"))


def test_every_updates_the_named_roles_only(tiny):
    built, step = make(tiny())
    for index in range(3):
        before = {role: state(module) for role, module in built.modules.items()}
        metrics = step(index)
        moved = {role for role, module in built.modules.items() if changed(before[role], module)}
        runs = index % 2 == 0
        assert moved == ({"generator", "fake_score"} if runs else {"fake_score"})
        wanted = {"critic/loss", "critic/grad_norm"} | (
            {f"generator/{n}" for n in ("loss", "grad_norm", "gradient_norm")} if runs else set()
        )
        assert metrics.keys() == wanted
        assert all(value.isfinite() and value.shape == () for value in metrics.values())
        assert all(parameter.grad is None for module in built.modules.values() for parameter in module.parameters())


def test_the_average_starts_late_and_then_lags(tiny):
    built, step = make(tiny())
    ema, source = built.emas["generator"], built.modules["generator"]
    for index in range(3):
        step(index)
        assert not changed(state(source), ema)
    before = state(ema)
    step(3)
    assert not changed(before, ema)  # the generator did not move either
    step(4)
    name = "head.head.weight"
    torch.testing.assert_close(state(ema)[name], (before[name] + state(source)[name]) / 2)


@pytest.mark.parametrize("per_rank", [1, 2])
def test_accumulation_equals_one_big_batch(tiny, per_rank):
    whole, whole_step = make(tiny(), *DOUBLE, "batch.global=4")
    split, split_step = make(tiny(), *DOUBLE, "batch.global=4", f"batch.per_rank={per_rank}")
    for index in range(3):
        one, other = whole_step(index), split_step(index)
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name].double(), other[name].double(), rtol=1e-5, atol=1e-9)
    for role in ("generator", "fake_score"):
        for key, tensor in whole.modules[role].state_dict().items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(split.modules[role].state_dict()[key], tensor, rtol=1e-7, atol=1e-9)


def test_learning_rates_follow_their_course(tiny):
    built, step = make(tiny(), "train.steps=4")
    found = []
    for index in range(4):
        step(index)
        found.append(built.optimizers["fake_score"].param_groups[0]["lr"])
    assert found == pytest.approx([2e-3, 2e-3, 2e-3, 2e-3 * 0.55])
    assert built.optimizers["generator"].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5)


def test_the_seed_decides_everything(tiny):
    def losses(*overrides):
        _, step = make(tiny(), *overrides)
        return [value.item() for index in range(2) for value in step(index).values()]

    assert losses() == losses()
    assert all(one != other for one, other in zip(losses(), losses("seed=4"), strict=True))


def test_the_global_random_state_is_neither_read_nor_changed(tiny):
    torch.manual_seed(1)
    _, step = make(tiny())
    before = torch.random.get_rng_state()
    first = step(0)["critic/loss"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(make(tiny())[1](0)["critic/loss"], first)


GIVES = """\
doc: A rollout and a loss on it.
inputs: [noise, prompt_embeds, key]
models: [generator]
nodes:
  - use: specs/rollout.yaml
    models: {denoiser: generator}
    out: {cache: null, exit_from: null, exit_to: null, gradient_mask: null}
    with: {steps: [1000, 500]}
  - {use: weigh_for_test, in: {value: x0}}
outputs: [x0, loss, loss_weight]
"""
READS = """\
doc: A denoising loss on latents that somebody else made.
inputs: [x0, prompt_embeds, key, noise]
models: [fake_score]
nodes:
  - {use: remember_for_test, in: {value: x0}}
  - {use: draw_timestep, in: {like: x0}, with: {per: sample}}
  - {use: add_noise, in: {x0: remembered}}
  - {use: flow_target, in: {x0: remembered}}
  - {use: predict_flow, models: {denoiser: fake_score}}
  - {use: flow_matching_loss}
outputs: [loss, loss_weight]
"""
PHASES = """\
phases:
  - {name: generator, update: generator, graph: gives.yaml, every: EVERY}
  - {name: critic, update: fake_score, graph: reads.yaml, every: EVERY, in: {x0: generator.x0}}
train"""


@pytest.fixture
def shared(tiny, tmp_path, nothing_stays_registered):
    """A recipe whose critic reads the generator's rollout, and the tensors that pass."""
    passed = {"made": [], "read": []}

    @transform(out=("loss", "loss_weight"), kind="reduced")
    def weigh_for_test(value):
        passed["made"].append(value.detach())
        return value.square().sum(), torch.tensor(float(value.numel()))

    @transform(out="remembered", kind="per_sample")
    def remember_for_test(value):
        assert not value.requires_grad
        passed["read"].append(value)
        return value

    (tmp_path / "gives.yaml").write_text(GIVES)
    (tmp_path / "reads.yaml").write_text(READS)
    path = tiny()
    text = path.read_text()
    start, end = text.index("phases:"), text.index("train: {steps")
    path.write_text(text[:start] + PHASES.replace("EVERY", "2").removesuffix("train") + text[end:])
    return path, passed


def test_a_phase_reads_an_earlier_ones_output(shared):
    path, passed = shared
    built, step = make(path, "batch.global=4", "batch.per_rank=2")
    before = state(built.modules["fake_score"])
    metrics = step(0)
    assert metrics.keys() == {f"{phase}/{name}" for phase in ("generator", "critic") for name in ("loss", "grad_norm")}
    assert changed(before, built.modules["fake_score"])
    assert len(passed["made"]) == len(passed["read"]) == 2
    assert all(torch.equal(made, read) for made, read in zip(passed["made"], passed["read"], strict=True))
    assert step(1) == {}


def test_what_it_reads_is_checked(shared):
    from sftk.errors import SpecError

    path, _ = shared
    with pytest.raises(SpecError, match=r"make `every` a multiple of 2"):
        load_recipe(path, ["phases.critic.every=3"])
    with pytest.raises(SpecError, match=r"the phase 'generator' has no output 'x1'"):
        load_recipe(path, ["phases.critic.in.x0=generator.x1"])
    assert load_recipe(path, ["phases.critic.every=4"])[0].recipe.phases[1].every == 4


def test_a_reader_gets_noise_though_its_producer_takes_none(shared, tmp_path):
    path, _ = shared
    gives = GIVES.replace("inputs: [noise, prompt_embeds, key]", "inputs: [frames, prompt_embeds, key]")
    gives = gives.replace("    models: {denoiser: generator}\n", "    models: {denoiser: generator}\n    in: {noise: frames}\n")
    (tmp_path / "gives.yaml").write_text(gives)
    _, step = make(path, "phases.generator.in.frames=latents")
    assert step(0)["critic/loss"].isfinite()
    _, step = make(path, "phases.generator.in.frames=noise")
    assert step(0)["critic/loss"].isfinite()


def test_a_role_bound_to_another_and_to_an_average(tiny):
    built, step = make(
        tiny("  real_score: {size: SIZE, weights: FOLDER/teacher.safetensors}\n", "  teacher: {ema_of: generator}\n"),
        "phases.0.models={real_score: teacher}",
    )
    assert built.ports["teacher"].module is built.emas["generator"].module
    before = state(built.modules["generator"])
    assert step(0)["generator/loss"].isfinite()
    assert changed(before, built.modules["generator"])


def test_two_roles_updated_by_one_phase(tiny):
    built, step = make(tiny(), "phases.0.update=[generator, fake_score]", "phases.0.every=1")
    before = state(built.modules["fake_score"])
    metrics = step(0)
    assert {"generator/grad_norm_generator", "generator/grad_norm_fake_score"} <= metrics.keys()
    assert changed(before, built.modules["fake_score"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_give_close_losses_and_fp32_weights(tiny, precision):
    built, step = make(tiny(), f"precision={precision}")
    reference = make(tiny())[1]
    for index in range(2):
        found, wanted = step(index), reference(index)
        assert all(torch.isfinite(value) for value in found.values())
        assert found["critic/loss"].item() == pytest.approx(
            wanted["critic/loss"].item(), rel=0.05 if precision == "bf16" else 0
        )
    assert {parameter.dtype for module in built.modules.values() for parameter in module.parameters()} == {torch.float32}


def test_checkpointing_changes_no_loss_and_no_weight(tiny):
    full = [f"models.{role}.checkpoint=full" for role in ("generator", "fake_score")]
    (plain, plain_step), (recomputed, recomputed_step) = make(tiny()), make(tiny(), *full)
    for index in range(3):
        one, other = plain_step(index), recomputed_step(index)
        assert {name: value.item() for name, value in one.items()} == {name: value.item() for name, value in other.items()}
    for role in plain.modules:
        assert not changed(state(plain.modules[role]), recomputed.modules[role])


def test_recent_inputs_are_those_of_two_steps(tiny):
    _, step = make(tiny(), "batch.per_rank=1")
    for index in range(3):
        step(index)
    assert {place: len(found) for place, found in step.recent.items()} == {
        (1, "critic"): 2,
        (2, "generator"): 2,
        (2, "critic"): 2,
    }


def test_frozen_roles_take_no_gradient(tiny):
    built, step = make(tiny())
    step(0)
    on = {role: {parameter.requires_grad for parameter in module.parameters()} for role, module in built.modules.items()}
    assert on == {"generator": {False}, "real_score": {False}, "fake_score": {True}}
    assert not any(tensor.requires_grad for ema in built.emas.values() for tensor in ema.state_dict().values())
