"""Triton kernels on a GPU, alone and in a compiled graph: results and gradients against float64 and the model's layers."""

from __future__ import annotations

import pytest
import torch
from elementwise_cases import CASES, Sizes
from kernel_checks import ODD, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Inductor and Triton warn about the machine they find
]
WIDE = Sizes(batch=1, frames=3, tokens_per_frame=100, heads=12, dim=128, hidden=8960)


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("sizes", [ODD, WIDE], ids=["odd", "wide"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_layers(name, sizes, backend):
    check(name, torch.bfloat16, torch.device("cuda"), sizes=sizes, backend=backend)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_layers_in_float32(name):
    check(name, torch.float32, torch.device("cuda"), sizes=WIDE)
