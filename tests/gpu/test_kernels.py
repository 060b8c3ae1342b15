"""Triton kernels on a GPU, alone and in a compiled graph: results and gradients against float64 and the model's layers."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from elementwise_cases import CASES, Sizes
from kernel_checks import ODD, check

from sftk.models import WanConfig, WanModel
from sftk.models.block_ops import PLAIN, BlockOps
from sftk.runtime.bench_cases import randomise_zeros
from sftk.runtime.parallelize import parallelize
from sftk.runtime.port import Port

if importlib.util.find_spec("triton") is not None:
    from sftk.models.kernels.block_ops import TritonOps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Inductor and Triton warn about the machine they find
]
CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=16, out_dim=16, freq_dim=64, text_dim=32, text_len=8)
WIDE = Sizes(batch=1, frames=3, tokens_per_frame=100, heads=12, dim=128, hidden=8960)


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("sizes", [ODD, WIDE], ids=["odd", "wide"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_layers(name, sizes, backend):
    check(name, torch.bfloat16, torch.device("cuda"), sizes=sizes, backend=backend)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_layers_in_float32(name):
    check(name, torch.float32, torch.device("cuda"), sizes=WIDE)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpoint", ["none", "selective", "products"])
def test_a_backbone_with_the_kernels(monkeypatch, compiled, checkpoint):
    """Flow and gradients in bf16 are as close to float32 as those without the kernels."""
    monkeypatch.setattr(TritonOps, "worth", 0)
    torch.manual_seed(0)
    model = WanModel(CONFIG).cuda()
    randomise_zeros(model)
    latents = torch.randn(2, 3, 16, 8, 8, device="cuda")
    timestep = torch.tensor([[100.0, 500.0, 900.0], [300.0, 200.0, 0.0]], device="cuda")
    text, cotangent = torch.randn(2, 8, 32, device="cuda"), torch.randn(2, 3, 16, 8, 8, device="cuda")

    def run(ops: BlockOps, dtype: torch.dtype | None) -> list[torch.Tensor]:
        copied = parallelize(copy.deepcopy(model), checkpoint=checkpoint, compile_blocks=compiled)
        copied.ops = ops
        port = Port(copied, dtype)
        with torch.no_grad():
            without = port(latents, timestep, text)[0]
        flow = port(latents, timestep, text)[0]
        flow.backward(cotangent)
        return [without, flow.detach(), *(p.grad for p in copied.parameters())]

    exact, usual, found = run(PLAIN, None), run(PLAIN, torch.bfloat16), run(TritonOps(), torch.bfloat16)
    for reference, plain, fused in zip(exact, usual, found, strict=True):
        assert fused.dtype == plain.dtype
        error, bound = ((x - reference).norm() / reference.norm() for x in (fused, plain))
        assert error <= 1.5 * bound + 1e-3
