"""Triton kernels against the model's own layers: in Triton's interpreter on the CPU, and as they are on a GPU (tests/gpu)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from elementwise_cases import CASES, results
from kernel_checks import ODD, check
from torch import nn
from torch.utils.checkpoint import checkpoint

from sftk.models.block_ops import PLAIN
from sftk.models.held_linear import HalfLinear

FOUND = importlib.util.find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
INTERPRETED = FOUND and os.environ.get("TRITON_INTERPRET") == "1"
NEEDS = "needs triton 3.9 or newer, whose interpreter runs loops with any NumPy"
inside = pytest.mark.skipif(not INTERPRETED, reason=f"runs in Triton's interpreter; {NEEDS}")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, where a GPU has infinity


@pytest.mark.skipif(not FOUND or INTERPRETED, reason=NEEDS)
def test_in_the_interpreter():
    """Triton asks for the interpreter when it is imported, so another process has it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off
@pytest.mark.parametrize("name", CASES)
def test_equals_the_layers(name, dtype):
    check(name, dtype, torch.device("cpu"))


@inside
@pytest.mark.parametrize("name", CASES)
def test_compiles_with_its_gradient(name):
    check(name, torch.float32, torch.device("cpu"), backend="aot_eager")


@inside
def test_an_activation_checkpoint_gives_the_same_gradient():
    case = CASES["residual_norm"]
    half, wide = case.make(ODD, torch.device("cpu"))
    upstream = [torch.ones_like(half[0]), half[1]]

    def call(*inputs):
        return checkpoint(case.fused, *inputs, use_reentrant=False)

    for a, b in zip(*(results(case, form, [*half, *wide], upstream) for form in (call, case.fused)), strict=True):
        assert torch.equal(a, b)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(37, 300), (200, 96), (1, 16)])
def test_rounds_to_fp8(sizes, dtype):
    """Values that fp8 holds: the interpreter does not carry what it rounds up into the next power of two."""
    from rounding_checks import check_rounding, representable

    values = representable(*sizes, torch.device("cpu"))
    check_rounding(values.to(dtype), exact=True)
    check_rounding(torch.zeros_like(values, dtype=dtype), exact=True)


@inside
def test_gelu_after_a_layer_that_trains_in_fp8():
    """The bias gets its gradient from GELU's kernel, once."""
    from sftk.models.kernels.block_ops import TritonOps

    torch.manual_seed(0)
    layer, x = HalfLinear(nn.Linear(32, 48), trains_fp8=True), torch.randn(2, 5, 32)
    grad, found = torch.randn(2, 5, 48), []
    for ops in (TritonOps(), PLAIN):
        y = ops.linear_gelu(layer, x)
        found.append((y.detach(), *torch.autograd.grad(y, layer.parameters(), grad)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@inside
@pytest.mark.parametrize("name", ["norm_rope", "modulated_norm", "residual_norm", "gelu_bias_backward"])
def test_operators_say_what_they_return(name):
    """Schema and fake results beside real ones."""
    case = CASES[name.replace("gelu_bias", "gelu")]
    half, wide = case.make(ODD, torch.device("cpu"))
    case.fused(*half, *wide)  # registers the operator
    tile = (8, 64, 1) if name == "gelu_bias_backward" else (1e-6, 4, 1)
    operator = getattr(torch.ops.sftk, name).default
    torch.library.opcheck(operator, (*half, *wide, *tile), test_utils=("test_schema", "test_faketensor"))
