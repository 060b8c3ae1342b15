"""What only a CUDA device can show: FlexAttention's kernels, compiled blocks and segments, delayed metrics, a whole run."""

import json
from typing import get_args

import pytest
import torch

from sftk.functional.apart import attention_apart
from sftk.functional.attention import UNMASKED, attention, attention_mask, available_backends, exact_derivatives
from sftk.functional.keys import Key
from sftk.functional.layout import Layout
from sftk.models import WanConfig, WanModel
from sftk.models.linear_gelu import linear_gelu
from sftk.models.text import load_text_encoder
from sftk.models.vae import WanVae, decode, decode_block
from sftk.runtime.activations import Checkpoint
from sftk.runtime.attention_shapes import Heads, Shape
from sftk.runtime.bench_attention import bench_attention
from sftk.runtime.parallelize import parallelize
from sftk.runtime.run import run_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Inductor and Triton warn about the machine they find
]

CONFIG = WanConfig(dim=192, ffn_dim=384, num_heads=3, num_layers=2, in_dim=16, out_dim=16, freq_dim=64, text_dim=32, text_len=8)


def random_model(dtype: torch.dtype = torch.float32) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.to("cuda", dtype)


@pytest.mark.parametrize("kind", ["block_causal", "teacher_forcing"])
@pytest.mark.parametrize("window", [None, 4])
def test_flex_equals_dense_attention_with_its_gradients(kind, window):
    layout = Layout(kind=kind, blocks=(1, 3, 3), window=window if kind == "block_causal" else None)
    tokens, cuda = 24, torch.device("cuda")
    q, k, v = (torch.randn(2, layout.frames * tokens, 3, 64, device=cuda, requires_grad=True) for _ in range(3))
    c = torch.randn_like(q)
    found = {}
    for backend in ("flex", "sdpa"):
        out = attention(q, k, v, mask=attention_mask(layout, tokens, cuda, backend), backend=backend)
        found[backend] = (out, *torch.autograd.grad((out * c).sum(), (q, k, v)))
    for ours, reference in zip(found["flex"], found["sdpa"], strict=True):
        assert (ours - reference).norm() / reference.norm() < 2e-3


@pytest.mark.parametrize("backend", ["sdpa", *UNMASKED])
@pytest.mark.parametrize("shape", [Shape(name="full", queries=256, keys=256), Shape(name="cross", queries=320, keys=96)])
@pytest.mark.parametrize("batch", [1, 2])
def test_unmasked_backends_are_exact_with_their_gradients(backend, shape, batch):
    if backend not in available_backends():
        pytest.skip(f"{backend} is not installed")
    heads = Heads(batch=batch, heads=4, head_dim=128, dtype=torch.bfloat16)
    report = bench_attention(heads, [shape], torch.device("cuda"), repeats=1)
    (row,) = [row for row in report["rows"] if row["backend"] == backend]
    assert "error" not in row, row["error"]
    assert max(row["errors"].values()) < 1e-2


@pytest.fixture
def counted():
    """The graphs that were compiled, and Inductor as a backend that notes them."""
    from torch._inductor.compile_fx import compile_fx

    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return compile_fx(graph, example)

    torch._dynamo.reset()
    return graphs, count


@pytest.mark.parametrize("compiled", [False, True])
def test_keys_are_attended_to_in_halves(compiled, counted):
    """Keys are the first ones of a longer buffer, of any number, halved without a copy; one graph serves all of them."""
    if "flash_split_kv" not in available_backends():
        pytest.skip("FlashAttention 4 is not installed")
    graphs, count = counted

    def attend(q, k, v):
        return attention(q, k, v, backend="flash_split_kv").flatten(2) * 2

    call = torch.compile(attend, backend=count, fullgraph=True, dynamic=False) if compiled else attend
    generator = torch.Generator("cuda").manual_seed(0)
    q, *buffers = (torch.randn(1, n, 3, 128, device="cuda", generator=generator).bfloat16() for n in (600, 2048, 2048))
    for keys in (512, 1000, 1001, 2048):
        k, v = (buffer[:, :keys] for buffer in buffers)
        for tensor in (k, v):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        exact = attention(q.float(), k.float(), v.float(), backend="math").flatten(2) * 2
        with torch.no_grad(), torch.profiler.profile(acc_events=True) as recorded:
            found = call(q, k, v)
        assert (found.float() - exact).norm() / exact.norm() < 1e-2, keys
        assert "sftk::flash_split_kv" in {event.key for event in recorded.key_averages()}
    assert len(graphs) == compiled


@pytest.mark.parametrize("compiled", [False, True])
def test_long_contexts_are_attended_to_where_they_lie(compiled, counted):
    """In chunks, one the start of a longer buffer; gradients are those in float32, and nothing of its length is made."""
    if "flash_split_kv" not in available_backends():
        pytest.skip("FlashAttention 4 is not installed")
    graphs, count = counted

    def attend(q, k, v, past):
        return attention_apart(q, k, v, past).flatten(2) * 2

    call = torch.compile(attend, backend=count, fullgraph=True, dynamic=False) if compiled else attend
    generator = torch.Generator("cuda").manual_seed(0)
    own = [torch.randn(1, 600, 3, 128, device="cuda", generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    sink, *buffers = (torch.randn(1, n, 3, 128, device="cuda", generator=generator).bfloat16() for n in (512, 65536, 65536))
    c = torch.randn(1, 600, 3 * 128, device="cuda", generator=generator)
    for keys in (40000, 45001, 65536):
        past = [(sink, sink), tuple(buffer[:, :keys] for buffer in buffers)]
        for tensor in past[1]:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        exact = [x.detach().float().requires_grad_() for x in own]
        joined = [torch.cat([sink, old, new], dim=1) for old, new in zip(past[1], exact[1:], strict=True)]
        reference = attention(exact[0], *joined, backend="math").flatten(2) * 2
        reference = (reference.detach(), *torch.autograd.grad((reference * c).sum(), exact))
        del joined
        torch.autograd.grad(call(*own, past).float().sum(), own)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call(*own, past)
        found = (out.detach(), *torch.autograd.grad((out * c).sum(), own))
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < 2 * buffers[0].nbytes * keys / 65536
        for ours, right in zip(found, reference, strict=True):
            assert (ours.float() - right).norm() / right.norm() < 1e-2, keys
    assert len(graphs) == compiled


def test_layouts_are_exact_by_mask_and_by_spans():
    layout, tokens = Layout(kind="block_causal", blocks=(1, 3, 3)), 96
    shape = Shape(name="block_causal", queries=7 * tokens, keys=7 * tokens, layout=layout, tokens_per_frame=tokens)
    heads = Heads(batch=1, heads=4, head_dim=128, dtype=torch.bfloat16)
    rows = {row["backend"]: row for row in bench_attention(heads, [shape], torch.device("cuda"), repeats=1)["rows"]}
    assert {"flex", "spans/sdpa", "spans/sdpa_cudnn", "spans/sdpa_flash"} <= set(rows)
    for name, row in rows.items():
        assert "error" not in row, (name, row["error"])
        assert max(row["errors"].values()) < 1e-2, name


def test_the_model_equals_itself_on_the_cpu():
    model = random_model()
    x, t, text = torch.randn(1, 6, 16, 8, 12), torch.rand(1, 6) * 1000, torch.randn(1, 8, 32)
    layout = Layout(kind="block_causal", blocks=(3, 3))
    with torch.no_grad():
        on_gpu = model(x.cuda(), t.cuda(), text.cuda(), layout=layout)[0].cpu()
        on_cpu = model.cpu()(x, t, text, layout=layout)[0]
    assert (on_gpu - on_cpu).norm() / on_cpu.norm() < 2e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_linear_layer_and_its_activation_in_one_kernel(compiled):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(256, 512, device="cuda"), torch.randn(2, 96, 256, device="cuda")
    call = torch.compile(linear_gelu, fullgraph=True) if compiled else linear_gelu
    exact = torch.nn.functional.gelu(layer(x), approximate="tanh")
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as recorded, torch.autocast("cuda", torch.bfloat16):
        found = call(layer, x)
    assert "sftk::linear_gelu" in {event.key for event in recorded.key_averages()}
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert (found - exact).norm() / exact.norm() < 5e-3
    with torch.no_grad():
        assert torch.equal(linear_gelu(layer, x), exact)  # float32 as ever
    half = layer.bfloat16()
    (grad,) = torch.autograd.grad(call(half, x.bfloat16()).float().sum(), half.weight)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("kind", [kind for kind in get_args(Checkpoint) if kind != "none"])
def test_compiled_blocks_with_flash_attention(kind):
    """No block runs eagerly, and gradients are those of the uncompiled model to rounding."""
    if "flash" not in available_backends():
        pytest.skip("FlashAttention is not installed")
    plain = random_model(torch.bfloat16)
    plain.backend = "flash"
    other = random_model(torch.bfloat16)
    other.backend = "flash"
    wrapped = parallelize(other, checkpoint=kind, compile_blocks=True)
    latents, text = torch.randn(1, 3, 16, 8, 8, device="cuda"), torch.randn(1, 8, 32, device="cuda")
    time = torch.full((1, 3), 500.0, device="cuda")
    torch._dynamo.utils.counters.clear()
    found = []
    for model in (plain, wrapped):
        out = model(latents, time, text)[0]
        found.append(
            (out, *torch.autograd.grad(out.float().square().sum(), [model.patch_embedding.weight, model.head.head.weight]))
        )
    assert not torch._dynamo.utils.counters["graph_break"]
    for ours, exact in zip(*reversed(found), strict=True):
        assert (ours - exact).float().norm() / exact.float().norm() < 3e-2


@pytest.mark.parametrize("checkpoint", get_args(Checkpoint))
def test_second_derivatives_through_flex_and_compiled_blocks(checkpoint):
    """The recomputation of a checkpoint runs in one of autograd's own threads."""
    x, t, text = torch.randn(1, 6, 16, 8, 12), torch.rand(1, 6) * 1000, torch.randn(1, 8, 32)
    layout, found = Layout(kind="block_causal", blocks=(3, 3)), []
    for device in ("cpu", "cuda"):
        model = random_model().to(device)
        if device == "cuda":
            parallelize(model, checkpoint=checkpoint, compile_blocks=True)
        inputs = [v.to(device).requires_grad_(v is x) for v in (x, t, text)]
        with exact_derivatives():
            flow = model(*inputs, layout=layout)[0]
        (grad,) = torch.autograd.grad(flow.square().sum(), inputs[0], create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), model.patch_embedding.weight)
        with torch.no_grad(), exact_derivatives():
            tangent = torch.func.jvp(lambda v, m=model, i=inputs: m(v, *i[1:], layout=layout)[0], (inputs[0],), (inputs[0],))[1]
        found.append((second.cpu(), tangent.cpu()))
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert (on_gpu - on_cpu).norm() / on_cpu.norm() < 5e-3


def test_noise_is_equal_under_any_split():
    whole = Key(seed=1, samples=(0, 1, 2)).normal("noise", (3, 4), device="cuda")
    parts = [Key(seed=1, samples=(i,)).normal("noise", (3, 4), device="cuda") for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))


OPTIONS = ["batch.global=4", "eval.enabled=false", "track.tensorboard=false", "checkpoint.every=2"]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): value for row in rows for key, value in row.items() if key.endswith("/loss")}


def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path):
    for compiled in ("true", "false"):
        run_recipe("recipes/dmd.yaml", [*OPTIONS, "train.steps=4", f"compile={compiled}"], run_dir=tmp_path / compiled)
    compiled, eager = losses(tmp_path / "true"), losses(tmp_path / "false")
    assert compiled.keys() == eager.keys()
    for key in eager:
        assert abs(compiled[key] - eager[key]) < 2e-2 * max(1.0, abs(eager[key])), key


def test_half_precision_and_checkpointing_run(tmp_path):
    options = [*OPTIONS, "train.steps=2", "precision=bf16", "compile=false", "models.generator.checkpoint=full"]
    run_recipe("recipes/dmd.yaml", options, run_dir=tmp_path)
    assert all(value == value for value in losses(tmp_path).values())


def test_the_vae_streams_on_the_device(monkeypatch):
    """Float32 without TensorFloat32: blocks give the whole decode, and the CPU's frames."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    module = diffusers.AutoencoderKLWan(base_dim=16).requires_grad_(False).eval()
    latents = torch.randn(1, 7, 16, 4, 6)
    on_cpu = decode(WanVae(module), latents)
    vae, state, frames = WanVae(module.cuda()), None, []
    for block in latents.split([1, 3, 3], dim=1):
        pictures, state = decode_block(vae, block, state)
        frames.append(pictures)
    torch.testing.assert_close(torch.cat(frames, dim=1), decode(vae, latents), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(frames, dim=1), on_cpu, rtol=0, atol=1e-4)


def test_an_offloaded_text_encoder_leaves_nothing_on_the_device(text_folders):
    kept = load_text_encoder(text_folders / "wan", tokens=24, device="cuda")
    offloaded = load_text_encoder(text_folders / "wan", tokens=24, device="cuda", offload=True)
    torch.testing.assert_close(offloaded(["a red fox"]), kept(["a red fox"]), rtol=0, atol=0)
    assert {parameter.device.type for parameter in offloaded.module.parameters()} == {"cpu"}
    assert {parameter.device.type for parameter in kept.module.parameters()} == {"cuda"}
