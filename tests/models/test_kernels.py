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
from torch.utils.checkpoint import checkpoint

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
@pytest.mark.parametrize("name", ["norm_rope", "modulated_norm", "residual_norm", "gelu_bias_backward"])
def test_operators_say_what_they_return(name):
    """Schema and fake results beside real ones."""
    case = CASES[name.replace("gelu_bias", "gelu")]
    half, wide = case.make(ODD, torch.device("cpu"))
    case.fused(*half, *wide)  # registers the operator
    tile = (8, 64, 1) if name == "gelu_bias_backward" else (1e-6, 4, 1)
    operator = getattr(torch.ops.sftk, name).default
    torch.library.opcheck(operator, (*half, *wide, *tile), test_utils=("test_schema", "test_faketensor"))
