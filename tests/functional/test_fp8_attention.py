"""Attention with fp8 products: the reference against exact attention, the kernel interpreted, a model that uses it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sftk.core.numerics import as_with_gradient
from sftk.errors import SpecError
from sftk.functional import KVCache
from sftk.functional.attention import attention, exact_derivatives
from sftk.functional.fp8_attention import TILE, fp8_attention
from sftk.functional.fp8_attention_training import fp8_attention_lse
from sftk.models import WanConfig, WanModel, pass_kind
from sftk.runtime.bench_cases import randomise_zeros

FOUND = importlib.util.find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
INTERPRETED = FOUND and os.environ.get("TRITON_INTERPRET") == "1"
NEEDS = "needs triton 3.9 or newer, whose interpreter runs loops with any NumPy"
CONFIG = WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=32, text_dim=32, text_len=4)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v))).transpose(1, 2)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def make(batch: int, queries: int, keys: int, heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys grow and values shrink from one tile to the next, so that scales differ."""
    torch.manual_seed(0)
    ramp = torch.linspace(0.1, 3, keys)[None, :, None, None]
    q, k, v = (torch.randn(batch, n, heads, dim) for n in (queries, keys, keys))
    return q, k * ramp, v / ramp


@pytest.mark.parametrize("keys", [TILE, 300, 1])
def test_the_reference_is_close(keys):
    q, k, v = make(2, 70, keys)
    assert 1e-3 < error(fp8_attention(q, k, v), exact(q, k, v)) < 0.08


@given(power=st.integers(-6, 6), other=st.integers(-6, 6))
def test_scales_take_powers_of_two(power, other):
    """Rounding is relative: what is larger by a power of two in one factor and smaller in the other is the same."""
    q, k, v = make(1, 5, 2 * TILE)
    found = fp8_attention(q * 2.0**power, k * 2.0**-power, v * 2.0**other)
    torch.testing.assert_close(found, fp8_attention(q, k, v) * 2.0**other, rtol=1e-5, atol=0)


def test_a_tile_does_not_feel_another_ones_scale():
    q, k, v = make(1, 5, 2 * TILE)
    v[:, TILE:] *= 1e4
    k[:, TILE:] = -50 * q.mean(dim=1, keepdim=True)  # far from every query: what it holds hardly counts
    near = [x[:, :TILE] for x in (k, v)]
    assert error(fp8_attention(q, *near), exact(q, *near)) < 0.08


def test_the_operator_says_what_it_returns():
    torch.library.opcheck(fp8_attention._opoverload, make(1, 5, 140), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("keys", [TILE, 300])
def test_gradients_are_close(keys):
    """They are those of attention at the output that fp8 found."""
    given = [x.requires_grad_() for x in make(2, 70, keys)]
    wanted, found = exact(*given), attention(*given, backend="fp8")
    assert torch.equal(found, fp8_attention(*given))
    cotangent = torch.randn_like(found)
    both = (torch.autograd.grad(out, given, cotangent.to(out.dtype)) for out in (found, wanted))
    for name, one, other in zip("qkv", *both, strict=True):
        assert 1e-4 < error(one, other.double()) < 0.15, name


def test_the_trained_operator_says_what_it_returns():
    given = [x.requires_grad_() for x in make(1, 5, 140)]
    torch.library.opcheck(fp8_attention_lse._opoverload, given)
    _, lse = fp8_attention_lse(*given)
    q, k, _ = (x.detach().transpose(1, 2) for x in given)
    torch.testing.assert_close(lse, (q @ k.mT / 32**0.5).logsumexp(-1), rtol=0.02, atol=0.02)


def test_what_it_does_not_do():
    q, k, v = make(1, 4, 4)
    with torch.no_grad(), pytest.raises(SpecError, match="takes no mask"):
        attention(q, k, v, mask=torch.ones(4, 4, dtype=torch.bool), backend="fp8")


def test_a_model_uses_it_without_gradient_and_where_it_is_told_to_with(monkeypatch):
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    randomise_zeros(model)
    inputs = (torch.randn(1, 3, 4, 4, 4), torch.full((1, 3), 500.0), torch.randn(1, 4, 32))

    def call(**extra):
        return model(*inputs, **extra)[0]

    with torch.no_grad():
        plain, cached = call(), call(cache=KVCache())
    with_gradient = call()
    model.fp8_attention = True
    assert torch.equal(call(), with_gradient)
    model.fp8_attention_trains = True
    assert torch.equal(call(), with_gradient)  # too few tokens
    monkeypatch.setattr(pass_kind, "FP8_TRAINING", 12)
    with as_with_gradient(), torch.no_grad():
        recorded = call()
    assert torch.equal(call(), recorded)
    assert 1e-5 < error(recorded, with_gradient.detach()) < 0.05
    monkeypatch.undo()
    with torch.no_grad():
        assert 1e-5 < error(call(), plain) < 0.05
        assert torch.equal(call(cache=KVCache()), call())
        assert not torch.equal(call(cache=KVCache()), cached)
        with exact_derivatives():
            assert error(call(), plain) < 1e-6


@pytest.mark.skipif(not FOUND or INTERPRETED, reason=NEEDS)
def test_in_the_interpreter():
    """Triton asks for the interpreter when it is imported, so another process has it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "kernel"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not INTERPRETED, reason=f"runs in Triton's interpreter; {NEEDS}")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("batch", "queries", "keys", "heads"), [(2, 70, 300, 3), (1, 64, 2 * TILE, 2), (1, 3, 500, 1)])
def test_the_kernel(monkeypatch, batch, queries, keys, heads, parts):
    """With codes of float16, which the interpreter rounds as a GPU does (fp8 it does not), what is left is exact attention."""
    from sftk.functional.kernels import fp8_attention as kernel
    from sftk.functional.kernels import fp8_codes

    monkeypatch.setattr(fp8_codes, "CODES", torch.float16)
    monkeypatch.setattr(kernel, "parts_of_keys", lambda *_: parts)
    q, k, v = make(batch, queries, keys, heads)
    assert error(kernel.attend(q, k, v), exact(q, k, v)) < 2e-3
    wide = torch.cat([k, v], dim=1)  # views of a longer buffer, as a cache's are
    again = kernel.attend(q, wide[:, :keys], wide[:, keys:])
    assert torch.equal(again, kernel.attend(q, k, v))
