"""Layers that read one input round it once, and return what each returns alone."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from sftk.core.numerics import as_with_gradient
from sftk.functional.attention import exact_derivatives
from sftk.models import layers
from sftk.models.held_linear import HalfLinear
from sftk.models.projections import projections
from sftk.runtime.lowp import Fp8Linear, use_fp8
from sftk.spec.lowp import LowpSection

BOTH = LowpSection(linears="fp8", training="fp8")
TRAINING = functools.partial(HalfLinear, trains_fp8=True)
KINDS = {
    "plain": (lambda layer: layer,) * 3,
    "half": (HalfLinear,) * 3,
    "trained": (TRAINING,) * 3,
    "fp8": (Fp8Linear,) * 3,
    "both": (functools.partial(Fp8Linear, trains_fp8=True),) * 3,
    "mixed": (lambda layer: layer, TRAINING, Fp8Linear),
}
ROUNDED = {"plain": (0, 0), "half": (0, 0), "trained": (1, 0), "fp8": (0, 1), "both": (1, 1), "mixed": (1, 1)}
"""How often the input is rounded with gradient, and without."""


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[object] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def rounded(self) -> int:
        return self.counts[torch.ops.sftk.fp8_rows.default]


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[nn.Module]]:
    torch.manual_seed(0)
    linears = [nn.Linear(32, width) for width in (48, 16, 32)]
    made = [of(linear) for of, linear in zip(KINDS[kind], linears, strict=True)]
    return torch.randn(2, 5, 32).to(dtype), made


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_returns_what_it_returns_alone(kind, cast):
    """Results and all gradients, to the bit; rounded once where it has to be rounded at all."""
    x, made = make(kind)
    x.requires_grad_()
    inputs, found = [x, *(p for layer in made for p in layer.parameters())], []
    for call in (lambda: projections(x, *made), lambda: [layer(x) for layer in made]):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), Operators() as operators:
            results = call()
        gradients = torch.autograd.grad(sum(y.float().square().sum() for y in results), inputs)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast), Operators() as without:
            results += call()
        found.append([*results, *gradients])
        if len(found) == 1:
            assert (operators.rounded, without.rounded) == ROUNDED[kind]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_compile_whole(kind, grad):
    x, made = make(kind)
    with torch.set_grad_enabled(grad):
        wanted = projections(x, *made)
        torch._dynamo.reset()
        found = torch.compile(lambda x: projections(x, *made), fullgraph=True, backend="eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_computes_in_full_precision_rounds_nothing():
    x, made = make("both")
    with exact_derivatives(), Operators() as operators:
        projections(x.requires_grad_(), *made)
    with forward_ad.dual_level(), Operators() as forward:
        tangents = [
            [forward_ad.unpack_dual(y).tangent for y in call(forward_ad.make_dual(x, torch.ones_like(x)))]
            for call in (lambda x: projections(x, *made), lambda x: [layer(x) for layer in made])
        ]
    assert operators.rounded == forward.rounded == 0
    for one, other in zip(*tangents, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_calls_that_are_made_again_are_rounded_as_with_gradient():
    x, made = make("both")
    with torch.no_grad(), as_with_gradient():
        found = projections(x, *made)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(found, made, strict=True))


def backbone(make_model) -> nn.Module:
    return use_fp8(make_model(torch.float32, dim=32, ffn_dim=64, text_dim=16), hold=True, lowp=BOTH)


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 4, 4, generator=generator)
    return latents, torch.full((2, 3), 500.0), torch.randn(2, 4, 16, generator=generator)


def compiled_graphs(model: nn.Module) -> list[str]:
    """The code of the graphs that blocks are compiled to from here on."""
    graphs: list[str] = []

    def keep(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    for block in model.get_submodule("blocks"):
        block.compile(fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep))
    return graphs


def test_a_block_rounds_each_input_once(make_model):
    """Of q, k, v; of o; of the text's k and v, and of q and o; of both feed-forward layers. Ten layers, seven inputs."""
    for grad in (False, True):
        model = backbone(make_model)
        with torch.set_grad_enabled(grad):
            model(*inputs())  # refreshes what is held
            reference = model(*inputs())[0]
            graphs = compiled_graphs(model)
            torch.testing.assert_close(model(*inputs())[0], reference, rtol=1e-4, atol=1e-5)
        forward = graphs[0]
        assert forward.count("sftk.fp8_rows.default") == (7 if grad else 6)
        assert forward.count("sftk.fp8_gelu_rows.default") == (0 if grad else 1)
        # Layers with gradient round their weight themselves.
        assert forward.count("sftk.fp8_linear.default") == (10 if grad else 0)


def test_a_backward_pass_rounds_no_input_again(make_model):
    """Gradients of what ten layers of two blocks return, each by rows; weights' gradients take the inputs as they are."""
    model = backbone(make_model)
    loss = model(*inputs())[0].square().sum()
    with Operators() as operators:
        loss.backward()
    assert operators.rounded == 0
    assert operators.counts[torch.ops.sftk.fp8_linear_input.default] == 20


@pytest.mark.parametrize("grad", [False, True])
def test_a_backbone_computes_what_it_did(make_model, monkeypatch, grad):
    """Against layers that each round for themselves."""
    model, found = backbone(make_model), []
    for separate in (False, True):
        if separate:
            monkeypatch.setattr(layers, "projections", lambda x, *each: [layer(x) for layer in each])
        one = copy.deepcopy(model)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), Operators() as operators:
            flow = one(*inputs())[0]
        if grad:
            flow.float().square().sum().backward()
        found.append((operators.rounded, flow.detach(), [p.grad for p in one.parameters() if p.grad is not None]))
    (fewer, flow, gradients), (more, reference, expected) = found
    assert more - fewer == 6  # two layers of three less, and one of two, in two blocks
    assert torch.equal(flow, reference)
    assert len(gradients) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
