"""What only a GPU that multiplies in fp8 can show: its products against the reference, a compiled rollout."""

from __future__ import annotations

import pytest
import torch

from sftk.core.graph import Graph
from sftk.functional.fp8_linear import fp8_linear
from sftk.functional.keys import Key
from sftk.functional.packed import pack
from sftk.models import WanConfig, WanModel
from sftk.runtime.bench_cases import randomise_zeros
from sftk.runtime.lowp import use_fp8
from sftk.runtime.parallelize import parallelize
from sftk.runtime.port import Port

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
