"""Second derivatives and forward mode through the backbone, against finite differences."""

from __future__ import annotations

from typing import get_args

import attrs
import pytest
import torch

from sftk.functional import Layout, attention, exact_derivatives
from sftk.functional.attention import attention_mask
from sftk.functional.attention_spans import Spans
from sftk.models import preset
from sftk.runtime.activations import Checkpoint
from sftk.runtime.parallelize import parallelize

FRAMES = 3
LAYOUTS = {
    "bidirectional": None,
    "block_causal": Layout(kind="block_causal", blocks=(1, 2)),
    "teacher_forcing": Layout(kind="teacher_forcing", blocks=(1, 2)),
}


@pytest.fixture(scope="module")
def digits(make_model):
    """A model of the digits size in float64 with random weights; attention is whatever the test asks for."""
    sizes = attrs.asdict(preset("digits")) | {"num_layers": 2}

    def make(backend="auto"):
        return make_model(torch.float64, seed=1, backend=backend, **sizes)

    return make


def flow_of(model, layout, embeds):
    """`(latents, timestep) -> flow` in that layout."""

    def flow(latents, timestep):
        positions = None if layout is None else layout.positions
        return model(latents, timestep, embeds, layout=layout, positions=positions)[0]

    return flow


def point(layout, randn):
    frames = FRAMES if layout is None else layout.frames
    return randn(1, frames, 4, 4, 4), 100 + 800 * randn(1, frames).sigmoid(), randn(1, 4, 32)


@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_mode_equals_finite_differences(digits, randn, name, backend):
    model = digits(backend).requires_grad_(False)
    latents, timestep, embeds = point(LAYOUTS[name], randn)
    flow = flow_of(model, LAYOUTS[name], embeds)
    toward = randn(*latents.shape), 100 * randn(*timestep.shape)
    with exact_derivatives():
        value, tangent = torch.func.jvp(flow, (latents, timestep), toward)
    torch.testing.assert_close(value, flow(latents, timestep), rtol=1e-10, atol=1e-12)
    step = 1e-5
    ahead, behind = (flow(latents + s * toward[0], timestep + s * toward[1]) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
    assert tangent.abs().mean() > 1e-2


@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_double_backward_equals_finite_differences(digits, randn, name, backend):
    model = digits(backend)
    latents, timestep, embeds = point(LAYOUTS[name], randn)
    flow, weight = flow_of(model, LAYOUTS[name], embeds), randn(*latents.shape)
    inputs = [latents.requires_grad_(), model.blocks[0].self_attn.q.weight, model.head.head.weight]
    along = [randn(*x.shape) for x in inputs]

    def penalty(*, create_graph=False):
        """Squared norm of a gradient with respect to the latents, as an R1 penalty has it."""
        score = (weight * flow(latents, timestep)).sum()
        return torch.autograd.grad(score, latents, create_graph=create_graph)[0].square().sum()

    with exact_derivatives():
        exact = penalty(create_graph=True)
    grads = torch.autograd.grad(exact, inputs)
    slope = sum((g * d).sum() for g, d in zip(grads, along, strict=True))

    step, values = 1e-5, []
    for sign in (1, -1, 0):
        with torch.no_grad():
            for x, d in zip(inputs, along, strict=True):
                x.add_(d, alpha=sign * step)
        values.append(penalty())
        with torch.no_grad():
            for x, d in zip(inputs, along, strict=True):
                x.sub_(d, alpha=sign * step)
    torch.testing.assert_close(exact.detach(), values[2], rtol=1e-9, atol=0)
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_fused_attention_alone_has_no_second_derivative(digits, randn):
    latents, timestep, embeds = point(None, randn)
    latents.requires_grad_()
    score = flow_of(digits("sdpa"), None, embeds)(latents, timestep).sum()
    with pytest.raises(RuntimeError, match="not implemented"):
        (grad,) = torch.autograd.grad(score, latents, create_graph=True)
        torch.autograd.grad(grad.square().sum(), latents)


@pytest.mark.parametrize("checkpoint", get_args(Checkpoint))
def test_compiled_and_checkpointed_blocks(digits, randn, checkpoint):
    """The derivatives are those of the plain model, the backward pass may come later, and compilation comes back."""
    plain, wrapped = digits(), parallelize(digits(), checkpoint=checkpoint)
    compiled = []

    def count(graph, example):
        compiled.append(graph)
        return graph.forward

    for block in wrapped.blocks:
        block.compile(backend=count)
    latents, timestep, embeds = point(None, randn)
    latents.requires_grad_()
    found = []
    for model in (plain, wrapped):
        with exact_derivatives():
            score = flow_of(model, None, embeds)(latents, timestep).square().sum()
            (grad,) = torch.autograd.grad(score, latents, create_graph=True)
        weights = [model.head.head.weight, *(dict(model.named_parameters())[n] for n in ("patch_embedding.weight",))]
        found.append(torch.autograd.grad(grad.square().sum(), weights))
    assert not compiled
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with exact_derivatives(), torch.no_grad():
        tangents = [
            torch.func.jvp(flow_of(m, None, embeds), (latents, timestep), (latents, timestep))[1] for m in (plain, wrapped)
        ]
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        wrapped(latents, timestep, embeds)
    assert compiled


def test_it_ends_where_it_says_also_when_something_fails(randn):
    layout = LAYOUTS["block_causal"]
    with pytest.raises(ZeroDivisionError), exact_derivatives(), exact_derivatives():
        raise ZeroDivisionError
    assert isinstance(attention_mask(layout, 1, torch.device("cpu"), "flash"), Spans)
    with exact_derivatives():
        with exact_derivatives():
            pass
        assert attention_mask(layout, 1, torch.device("cpu"), "flash").shape == (3, 3)


def test_a_block_mask_made_before_is_read_as_a_dense_one(randn):
    layout, tokens = LAYOUTS["block_causal"], 2
    q, k, v = (randn(1, 6, 2, 4).requires_grad_() for _ in range(3))
    mask = attention_mask(layout, tokens, torch.device("cpu"), "flex")

    def exact(*x):
        with exact_derivatives():
            return attention(*x, mask=mask, backend="flex")

    assert torch.autograd.gradgradcheck(exact, (q, k, v))
    torch.testing.assert_close(exact(q, k, v), attention(q, k, v, mask=mask, backend="flex"), rtol=1e-10, atol=1e-12)
