"""Attention in pieces equals attention under a mask, with its gradients, for every layout."""

from __future__ import annotations

import pytest
import torch

from sftk.functional.attention import attention, attention_mask, exact_derivatives
from sftk.functional.attention_spans import frame_spans, token_spans
from sftk.functional.layout import Layout

LAYOUTS = {
    "block-causal": Layout(kind="block_causal", blocks=(1, 3, 3)),
    "one block": Layout(kind="block_causal", blocks=(4,)),
    "window": Layout(kind="block_causal", blocks=(2, 2, 2, 2), window=4),
    "window and sink": Layout(kind="block_causal", blocks=(2, 2, 2, 2), window=4, sink=1),
    "teacher forcing": Layout(kind="teacher_forcing", blocks=(1, 2, 2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_equals_a_mask(name):
    layout, tokens = LAYOUTS[name], 3
    generator = torch.Generator().manual_seed(0)
    shape = (2, layout.frames * tokens, 2, 8)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = attention_mask(layout, tokens, torch.device("cpu"), "math")
    spans = token_spans(layout, tokens)
    outs = attention(q, k, v, mask=spans), attention(q, k, v, mask=mask, backend="math")
    found = [(out, *torch.autograd.grad(out, (q, k, v), cotangent)) for out in outs]
    for ours, masked in zip(*found, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_spans_are_the_mask_row_by_row(name):
    layout = LAYOUTS[name]
    drawn = torch.zeros(layout.frames, layout.frames, dtype=torch.bool)
    for (start, stop), seen in frame_spans(layout):
        for first, last in seen:
            drawn[start:stop, first:last] = True
    assert torch.equal(drawn, layout.frame_mask())


def test_backends_without_masks_take_spans_and_exact_derivatives_do_not():
    layout, cpu = LAYOUTS["window"], torch.device("cpu")
    spans = attention_mask(layout, 2, cpu, "flash")
    assert spans == token_spans(layout, 2)
    q = torch.randn(1, layout.frames * 2, 1, 4, dtype=torch.float64, requires_grad=True)
    with exact_derivatives():
        out = attention(q, q, q, mask=spans, backend="flash")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), q)[0].abs().max() > 0
    torch.testing.assert_close(out, attention(q, q, q, mask=attention_mask(layout, 2, cpu, "sdpa")))


def test_spans_compile_into_one_graph():
    layout, tokens = LAYOUTS["window and sink"], 2
    spans = token_spans(layout, tokens)
    q, k, v = torch.randn(3, 1, layout.frames * tokens, 2, 4, dtype=torch.float64)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask=spans), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, mask=spans))
