"""The operators around FlashAttention 4, with kernels on the CPU in the place of its own: autograd, compile, checkpoints."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from sftk.errors import SpecError
from sftk.functional import flash as module
from sftk.functional.attention import attention
from sftk.functional.flash import flash, flash_backward
from sftk.runtime.activations import checkpointed, products_checkpointed, selectively_checkpointed

pytestmark = pytest.mark.usefixtures("kernels")


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def test_the_operators_keep_their_promises():
    q, k, v = inputs(torch.float32)
    opcheck(flash, (q, k, v), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
    out, lse = (x.detach() for x in flash(q, k, v))
    given = (torch.ones_like(out), *(x.detach() for x in (q, k, v)), out, lse)
    opcheck(flash_backward, given, test_utils=("test_schema", "test_faketensor"))


def gradients(call):
    leaves = inputs()
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves)


def layer(q, k, v):
    return flash(q * 2, k.sin(), v)[0].cos()


def test_gradients_are_those_of_attention():
    expected = gradients(lambda q, k, v: attention(q * 2, k.sin(), v, backend="math").cos())
    for found in (gradients(layer), gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))):
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)  # the log-sum-exp is in float32


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("through", "times"), [(checkpointed, 2), (selectively_checkpointed, 1), (products_checkpointed, 1)])
def test_checkpoints_know_it(kernels, through, times, compiled):
    torch._dynamo.reset()

    def run(q, k, v):
        return through(layer, q, k, v)

    call = torch.compile(run, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else run
    expected = gradients(layer)
    kernels.calls.clear()
    for ours, exact in zip(gradients(call), expected, strict=True):
        torch.testing.assert_close(ours, exact)
    assert kernels.calls.count("forward") == times
    assert kernels.calls.count("backward") == 1


@pytest.fixture
def install(monkeypatch):
    """Puts a module in the place of FlashAttention."""

    def put(name, function):
        monkeypatch.setitem(sys.modules, name.split(".")[0], SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=function))
        forget()

    def forget():
        module._functions.clear()
        module._missing.clear()

    forget()
    yield put
    forget()


@pytest.mark.parametrize("name", module.MODULES)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_installed_is_used_and_compiles(kernels, install, name, compiled):
    torch._dynamo.reset()
    if not module.has_flash():
        with pytest.raises(SpecError, match="needs FlashAttention"):
            module.flash_attention(*torch.zeros(3, 1, 2, 1, 8))
    install(name, older)
    assert module.has_flash()
    assert module.has_flash_4() == (name == module.MODULES[0])
    call = module.flash_attention
    if compiled:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    q, k, v = inputs()
    expected = kernels.forward(q, k, v, True)[0] if name == module.MODULES[0] else q + 1
    torch.testing.assert_close(call(q, k, v), expected)


def older(q, k, v):
    return q + 1, None
