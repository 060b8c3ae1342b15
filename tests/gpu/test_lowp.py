"""What only a GPU that multiplies in fp8 can show: its products against the reference, a compiled rollout."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from rounding_checks import fp8_linear

from sftk.core.graph import Graph
from sftk.functional.flash import has_flash_4
from sftk.functional.fp8_attention import fp8_attention
from sftk.functional.fp8_attention_training import fp8_attention_lse, fp8_training_attention
from sftk.functional.fp8_rounding import fp8_gelu_rows, fp8_rows
from sftk.functional.keys import Key
from sftk.functional.packed import pack
from sftk.models import WanConfig, WanModel
from sftk.models.fp8_training import fp8_training_linear
from sftk.runtime.bench_cases import randomise_zeros
from sftk.runtime.lowp import use_fp8
from sftk.runtime.parallelize import parallelize
from sftk.runtime.port import Port
from sftk.spec.lowp import LowpSection

if importlib.util.find_spec("triton") is not None:
    from sftk.models.kernels.block_ops import TritonOps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU that multiplies in fp8",
    ),
    pytest.mark.filterwarnings("default"),  # Inductor and Triton warn about the machine they find
]

CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=16, out_dim=16, freq_dim=64, text_dim=32, text_len=8)


@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_the_reference(compiled):
    """The device's product of both factors in fp8 against their rounded values multiplied in float32 on the CPU."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 100, 192).bfloat16(), torch.randn(384, 192) / 14, torch.randn(384)
    reference = fp8_linear(x.float(), pack(weight, "fp8"), bias)
    call = torch.compile(fp8_linear, fullgraph=True) if compiled else fp8_linear
    found = call(x.cuda(), pack(weight.cuda(), "fp8"), bias.cuda())
    assert (found.dtype, found.shape) == (torch.bfloat16, reference.shape)
    assert (found.cpu().float() - reference).norm() / reference.norm() < 6e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(4680, 1536), (333, 8960), (1536, 8960), (8960, 1536), (48, 32), (17, 16)])
def test_kernels_round_as_the_reference(sizes, dtype):
    from rounding_checks import check_rounding, representable

    torch.manual_seed(0)
    device = torch.device("cuda")
    check_rounding(representable(*sizes, device).to(dtype), exact=True)
    of_rows = torch.logspace(-6, 2, sizes[0], device=device)[:, None]
    check_rounding((torch.randn(sizes, device=device) * of_rows).to(dtype), exact=False)
    check_rounding(torch.zeros(sizes, device=device, dtype=dtype), exact=True)


@pytest.mark.parametrize("sizes", [(4680, 8960), (100, 64)])
def test_gelu_is_rounded_as_it_is_computed(sizes):
    torch.manual_seed(0)
    x = torch.randn(sizes, device="cuda").bfloat16()
    (codes, scale), (other, other_scale) = fp8_gelu_rows(x), fp8_rows(F.gelu(x, approximate="tanh"))
    torch.testing.assert_close(scale, other_scale, rtol=0.01, atol=0)
    one, two = codes.float() * scale, other.float() * other_scale
    assert (one - two).norm() / two.norm() < 0.01


SHAPES = [
    (1, 4680, 9360, 12, 128),
    (2, 300, 1000, 3, 64),
    (1, 100, 128, 2, 32),
    (1, 64, 5, 1, 128),
    (1, 2000, 2048, 2, 128),
    (3, 130, 4000, 40, 64),  # more items than an H100 has multiprocessors
]


def factors(batch: int, queries: int, keys: int, heads: int, dim: int) -> list[torch.Tensor]:
    """Keys grow and values shrink from one tile to the next, so that scales differ."""
    torch.manual_seed(0)
    ramp = torch.linspace(0.1, 2, keys)[None, :, None, None]
    q, k, v = (torch.randn(batch, length, heads, dim) for length in (queries, keys, keys))
    return [x.bfloat16() for x in (q, k * ramp, v / ramp)]


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads = (x.transpose(1, 2).float() for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_reference(shape, compiled):
    """The kernel against the same rounding on the CPU, whose probabilities are not rounded, and against exact attention."""
    given = factors(*shape)
    with torch.no_grad():
        reference = fp8_attention(*(x.float() for x in given))
        call = torch.compile(fp8_attention, fullgraph=True) if compiled else fp8_attention
        found = call(*(x.cuda() for x in given)).cpu().float()
    exact = attended(*given)
    assert (found - reference).norm() / reference.norm() < 0.05
    assert (found - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_kernels_attend_alike(shape, parts, monkeypatch):
    from sftk.functional.kernels import fp8_attention as kernel

    given = [x.cuda() for x in factors(*shape)]
    best = kernel.form_for(given[0].device, shape[-1])
    if best is kernel.TILES:
        pytest.skip("the portable kernel is the only one here")
    monkeypatch.setattr(kernel, "parts_of_keys", lambda *_: parts)
    one, two = kernel.attend(*given, form=best).float(), kernel.attend(*given, form=kernel.TILES).float()
    assert (one - two).norm() / two.norm() < 0.03  # each rounds probabilities relative to its own running maximum
    assert torch.equal(one, kernel.attend(*given, form=best).float())


@pytest.mark.parametrize("portable", [False, True])
def test_long_sums_keep_what_values_have_in_common(portable):
    """Hopper's tensor cores sum fp8 products with 14 bits; over 32760 keys that would lose a fifth of a mean of one."""
    from sftk.functional.kernels import fp8_attention as kernel

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, 12, 128, device="cuda").bfloat16() for length in (300, 32760, 32760))
    v = v + 1
    form = kernel.TILES if portable else kernel.form_for(q.device, 128)
    exact = attended(q, k, v)
    assert (kernel.attend(q, k, v, form=form).float() - exact).norm() / exact.norm() < 0.01


@pytest.mark.skipif(not has_flash_4(), reason="needs FlashAttention 4, which computes the gradients")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(1, 4680, 9360, 2, 128), (2, 300, 1000, 3, 128)])
def test_attention_in_fp8_has_gradients(shape, compiled):
    torch.manual_seed(0)
    batch, queries, keys, heads, dim = shape
    given = [torch.randn(batch, n, heads, dim, device="cuda").bfloat16().requires_grad_() for n in (queries, keys, keys)]
    call = torch.compile(fp8_training_attention, fullgraph=True) if compiled else fp8_training_attention
    found, wanted = call(*given), attended(*given)
    cotangent = torch.randn_like(found)
    both = (torch.autograd.grad(out, given, cotangent.to(out.dtype)) for out in (found, wanted))
    for name, one, other in zip("qkv", *both, strict=True):
        assert 1e-3 < (one.float() - other.float()).norm() / other.float().norm() < 0.1, name
    lse = fp8_attention_lse(*(x.detach() for x in given))[1]
    q, k, _ = (x.detach().float().transpose(1, 2) for x in given)
    torch.testing.assert_close(lse, (q @ k.mT / dim**0.5).logsumexp(-1), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_training_products_are_the_reference(mode):
    """Product and gradients on the device against the reference on the CPU, weights in float32 under autocast."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 100, 192), torch.randn(384, 192) / 14, torch.randn(384)]
    grad = torch.randn(2, 100, 384).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        torch._dynamo.reset()
        call = fp8_training_linear
        if mode != "eager" and device == "cuda":
            call = torch.compile(call, fullgraph=True, backend=mode)
        given = [t.to(device).requires_grad_() for t in inputs]
        with torch.autocast(device, torch.bfloat16):
            y = call(*given)
        found.append([y.detach(), *torch.autograd.grad(y, given, grad.to(device))])
    for index, (reference, one) in enumerate(zip(*found, strict=True)):
        assert (one.dtype, one.shape) == (reference.dtype, reference.shape), index
        assert (one.cpu().float() - reference.float()).norm() / reference.float().norm() < 6e-3, index


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpoint", ["none", "selective", "products"])
@pytest.mark.parametrize("kernels", [False, True])
def test_a_backbone_trains_in_fp8(compiled, checkpoint, kernels, monkeypatch):
    """Flow and gradients in bf16 are near those without, in all weights together; blocks compile whole."""
    monkeypatch.setattr(TritonOps, "worth", 0)
    latents, text = torch.randn(2, 3, 16, 8, 8, device="cuda"), torch.randn(2, 8, 32, device="cuda")
    cotangent, found = torch.randn(2, 3, 16, 8, 8, device="cuda"), []
    for training in ("full", "fp8"):
        model = random_model().requires_grad_(True)
        use_fp8(model, hold=False, lowp=LowpSection(training=training))
        parallelize(model, checkpoint=checkpoint, compile_blocks=compiled)
        model.ops = TritonOps() if kernels else model.ops
        flow = Port(model, torch.bfloat16)(latents, torch.full((2, 3), 500.0, device="cuda"), text)[0]
        flow.backward(cotangent)
        found.append((flow.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for exact, rounded in zip(*found, strict=True):
        assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.1


def random_model() -> WanModel:
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    randomise_zeros(model)
    return model.cuda().requires_grad_(False)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rollout_with_a_packed_cache_is_close(compiled):
    model = use_fp8(random_model(), hold=True)
    if compiled:
        parallelize(model, compile_blocks=True)
    values = {"noise": torch.randn(1, 9, 16, 8, 8, device="cuda"), "prompt_embeds": torch.randn(1, 8, 32, device="cuda")}
    values["key"] = Key(seed=0, samples=(0,))
    found = []
    for module, kept in ((random_model(), "full"), (model, "int8")):
        graph = Graph.from_spec("specs/rollout.yaml", steps=(1000, 500), last_step_only=True, kv_cache=kept)
        with torch.no_grad():
            found.append(graph.subgraph(["x0"]).run(values, {"denoiser": Port(module, torch.bfloat16)})["x0"])
    assert 1e-4 < (found[1] - found[0]).norm() / found[0].norm() < 0.1
