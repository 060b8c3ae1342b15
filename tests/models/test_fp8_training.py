"""Linear layers that are trained in fp8: what is rounded and what is not, how far it may be off, who knows the operators."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from sftk.core.numerics import as_with_gradient
from sftk.functional.attention import exact_derivatives
from sftk.functional.fp8_rounding import fp8_rows
from sftk.models import fp8_training
from sftk.models.fp8_training import fp8_training_linear
from sftk.models.held_linear import HalfLinear, hold_linears
from sftk.models.linear_gelu import linear_gelu
from sftk.runtime.parallelize import parallelize

OPERATORS = (torch.ops.sftk.fp8_rows, torch.ops.sftk.fp8_linear, torch.ops.sftk.fp8_linear_input)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows of very different size, which one scale for all would lose."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x * torch.logspace(-6, 2, x.shape[-2])[:, None] if x.ndim > 1 else x).to(dtype) for x in found]


def rounded(values: Tensor) -> Tensor:
    """To e4m3 by rows, in float64, without the functions that are tested."""
    wide = values.double()
    scale = wide.abs().amax(-1, keepdim=True) / 448
    return (wide / scale).to(torch.float8_e4m3fn).double() * scale


def distance(found: Tensor, reference: Tensor) -> float:
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_products_are_those_of_the_rounded_factors(dtype, close):
    x, weight, bias, grad = draw((2, 5, 32), (48, 32), (48,), (2, 5, 48), dtype=dtype)
    inputs = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = fp8_training_linear(*inputs)
    dx, dw, db = torch.autograd.grad(y, inputs, grad)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype,) * 4
    assert distance(y, rounded(x) @ rounded(weight).T + bias.double()) < close
    assert distance(dx, rounded(grad) @ rounded(weight.T).T) < close


def test_errors_are_within_those_of_e4m3():
    """Three bits after the leading one: a factor is off by 1/16 of itself at most, or by half of the smallest code."""
    x, weight, grad = draw((64, 96), (160, 96), (64, 160))
    x.requires_grad_()
    y = fp8_training_linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, grad)
    for found, (left, right) in {y: (x, weight), dx: (grad, weight.T)}.items():
        left, right = left.detach().double(), right.double()
        off = [z.abs() / 16 + z.abs().amax(-1, keepdim=True) / 448 * 2**-10 for z in (left, right)]
        bound = off[0] @ right.abs().T + left.abs() @ off[1].T + off[0] @ off[1].T
        error = (found.double() - left @ right.T).abs()
        assert (error <= 1.0001 * bound).all()
        assert error.norm() > 0.02 * bound.norm()
        assert distance(found, left @ right.T) < 0.05


def test_gradients_of_weight_and_bias_are_those_in_bfloat16():
    """To the bit, given the same gradient from above; the weights are float32, as autocast has them."""
    x, weight, bias, grad = draw((2, 5, 32), (48, 32), (48,), (2, 5, 48))
    found = []
    for call in (fp8_training_linear, F.linear):
        parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x, *parameters)
        found.append((y, *torch.autograd.grad(y, parameters, grad.bfloat16())))
    (y, *ours), (reference, *theirs) = found
    assert y.dtype == torch.bfloat16
    assert 0.01 < distance(y, reference) < 0.05
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@given(
    st.lists(st.integers(-30, 30), min_size=3, max_size=3),
    st.lists(st.integers(-30, 30), min_size=16, max_size=16),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_powers_of_two_pass_through(rows, columns, seed):
    """Scaled rows of x scale rows of y, scaled rows of the weight its columns: nothing else is rounded."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 32, generator=generator), torch.randn(16, 32, generator=generator)
    left, right = (torch.tensor(powers).float().exp2() for powers in (rows, columns))
    expected = fp8_training_linear(x, weight) * left[:, None] * right
    assert torch.equal(fp8_training_linear(x * left[:, None], weight * right[:, None]), expected)


def test_only_what_is_asked_for_is_computed_and_kept(monkeypatch):
    """A frozen weight's gradient is not computed, nor its input kept; no gradient goes to an input that takes none."""
    calls, inner = [], fp8_training._outer
    monkeypatch.setattr(fp8_training, "_outer", lambda *given: (calls.append(1), inner(*given))[1])
    x, weight = draw((4, 16), (16, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        y = fp8_training_linear(x.requires_grad_(), weight)
    y.sum().backward()
    assert (calls, kept) == ([], [(16, 16)])
    x, weight.requires_grad = x.detach(), True
    fp8_training_linear(x, weight).sum().backward()
    assert calls == [1]
    assert weight.grad is not None


def test_second_derivatives():
    """The operators are each other's gradients: a penalty on the input's gradient reaches the weight."""
    x, weight, grad = (t.requires_grad_() for t in draw((4, 32), (48, 32), (4, 48)))
    found = []
    for call in (fp8_training_linear, F.linear):
        (dx,) = torch.autograd.grad(call(x, weight), x, grad, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (weight, grad)))
    for one, other in zip(*found, strict=True):
        assert 0 < distance(one, other) < 0.1


def test_operators_say_what_they_return():
    x, weight, bias, grad = draw((2, 4, 32), (48, 32), (48,), (2, 4, 48))
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # no comparison of fp8 on a CPU
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, weight, bias, grad = (t.to(dtype) for t in (x, weight, bias, grad))
        codes, scale = fp8_rows(x)
        parameters = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        arguments = ((x,), (x.clone().requires_grad_(), codes, scale, *parameters), (grad.requires_grad_(), parameters[0]))
        for operator, given_ in zip(OPERATORS, arguments, strict=True):
            torch.library.opcheck(operator.default, given_, test_utils=tests)


@pytest.fixture
def models(make_model):
    plain = make_model(torch.float32, dim=32, ffn_dim=64, text_dim=16)
    kind = functools.partial(HalfLinear, trains_fp8=True)
    return plain, hold_linears(copy.deepcopy(plain), kind, hold=False)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 4, 4, generator=generator)
    return latents, torch.full((2, 3), 500.0), torch.randn(2, 4, 16, generator=generator)


def step(model: nn.Module) -> list[Tensor]:
    """Flow and gradients under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        flow = model(*inputs())[0]
    flow.float().square().sum().backward()
    found = [flow.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def test_a_backbone_is_close_to_itself(models):
    plain, trained = models
    assert list(plain.state_dict()) == list(trained.state_dict())
    pairs = list(zip(step(trained), step(plain), strict=True))
    assert all(1e-5 < distance(one, other) < 0.3 for one, other in pairs if other.norm() > 1e-3)
    with torch.no_grad():
        assert torch.equal(trained(*inputs())[0], plain(*inputs())[0])


def test_calls_that_are_made_again_round_as_with_gradient(models):
    plain, trained = models
    reference = trained(*inputs())[0].detach()
    with torch.no_grad(), as_with_gradient():
        assert torch.equal(trained(*inputs())[0], reference)
    assert not torch.equal(plain(*inputs())[0], reference)


def test_exact_derivatives_and_forward_mode_are_in_full_precision():
    (x,) = draw((4, 16))
    linear = nn.Linear(16, 16)
    layer = HalfLinear(linear, trains_fp8=True)
    assert not torch.equal(layer(x), linear(x))
    with exact_derivatives():
        assert torch.equal(layer(x), linear(x))
    with forward_ad.dual_level():
        pair = forward_ad.make_dual(x, torch.ones_like(x))
        one, other = (forward_ad.unpack_dual(call(pair)) for call in (layer, linear))
        assert one.tangent is not None
        assert torch.equal(one.tangent, other.tangent)
        assert torch.equal(one.primal, other.primal)


def test_gelu_follows_the_layer():
    layer, (x,) = HalfLinear(nn.Linear(16, 32), trains_fp8=True), draw((4, 16))
    assert torch.equal(linear_gelu(layer, x), F.gelu(fp8_training_linear(x, layer.weight, layer.bias), approximate="tanh"))


@pytest.mark.parametrize("checkpoint", ["none", "full", "selective", "products"])
def test_checkpointed_and_compiled_blocks_give_the_same(models, checkpoint):
    torch._dynamo.reset()
    _, model = models
    reference = step(copy.deepcopy(model))
    wrapped = parallelize(model, checkpoint=checkpoint)
    for one, other in zip(step(wrapped), reference, strict=True):
        assert torch.equal(one, other)
    for block in wrapped.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for one, other in zip(step(wrapped), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


@pytest.mark.parametrize(("kind", "times"), [("full", 20), ("selective", 18), ("products", 0)])
def test_checkpoints_know_the_products(models, kind, times):
    """Ten layers in each of two blocks, of which the second one of the feed-forward layer narrows: `selective` keeps it."""
    counted = Counter()
    wrapped = parallelize(models[1], checkpoint=kind)
    with counted:
        step(wrapped)
    assert counted.times == 20 + times


class Counter(TorchDispatchMode):
    """Counts forward products in fp8."""

    times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func is OPERATORS[1].default
        return func(*args, **(kwargs or {}))
