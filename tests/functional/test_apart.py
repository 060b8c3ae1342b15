"""Attention over cached and own keys where they lie, against attention over a copy that joins them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from sftk.errors import ShapeError, SpecError
from sftk.functional import apart
from sftk.functional.apart import APART_OP, attention_apart
from sftk.functional.attention import attention
from sftk.functional.meta_attention import BACKWARD_OP, FORWARD_OP, attention_flops
from sftk.runtime.activations import checkpointed, products_checkpointed, selectively_checkpointed
from sftk.runtime.plan_trace import Trace


def drawn(chunks=(4, 3), own=5, queries=5, batch=1, dtype=torch.float64, sharpness=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens):
        return torch.randn(batch, tokens, 3, 8, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(queries) * sharpness, normal(own), normal(own)
    return (q, k, v), [(normal(tokens), normal(tokens)) for tokens in chunks]


def joined(q, k, v, past):
    keys, values = (torch.cat([*old, new], dim=1) for old, new in zip(zip(*past, strict=True), (k, v), strict=True))
    return attention(q, keys, values, backend="math")


def gradients(call, own, past):
    leaves = [x.detach().requires_grad_() for x in own]
    out = call(*leaves, past)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    own=st.integers(1, 5),
    queries=st.integers(1, 5),
    batch=st.integers(1, 2),
    piece=st.integers(1, 10),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_it_is_attention_over_all_keys_with_its_gradients(chunks, own, queries, batch, piece, sharpness, seed):
    """Whatever the sizes of chunks and of the pieces in which a backward pass takes them."""
    tensors, past = drawn(chunks, own, queries, batch, sharpness=sharpness, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "PIECE", piece)
        found = gradients(attention_apart, tensors, past)
    for ours, exact in zip(found, gradients(joined, tensors, past), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_half_precision_sums_the_queries_gradient_in_float32(monkeypatch):
    """Many small pieces cost no precision: the sum is as near to the exact gradient as that of one piece."""
    tensors, past = drawn((512,), dtype=torch.bfloat16)
    exact = gradients(joined, [x.double() for x in tensors], [(k.double(), v.double()) for k, v in past])
    for piece in (512, 4):
        monkeypatch.setattr(apart, "PIECE", piece)
        for ours, right in zip(gradients(attention_apart, tensors, past), exact, strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours.double() - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("chunks", [(4,), (4, 3)])
def test_the_operators_keep_their_promises(chunks):
    (q, k, v), past = drawn(chunks, dtype=torch.float32)
    keys, values = map(list, zip(*past, strict=True))
    opcheck(apart._forward_op, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), keys, values))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = apart._forward_op(q, k, v, keys, values)
    given = (torch.ones_like(out).transpose(1, 2).contiguous().transpose(1, 2), q, k, v, keys, values, out, lse)
    opcheck(apart._backward_op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("through", "times"), [(checkpointed, 2), (selectively_checkpointed, 1), (products_checkpointed, 1)])
def test_checkpoints_know_it(monkeypatch, through, times, compiled):
    torch._dynamo.reset()
    calls = []
    attend = apart._attend
    monkeypatch.setattr(apart, "_attend", lambda *given: calls.append(1) or attend(*given))

    def layer(q, k, v, past):
        return attention_apart(q * 2, k.sin(), v, past).cos()

    def run(*given):
        return through(layer, *given)

    call = torch.compile(run, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else run
    tensors, past = drawn()
    expected = gradients(layer, tensors, past)
    calls.clear()
    for ours, exact in zip(gradients(call, tensors, past), expected, strict=True):
        torch.testing.assert_close(ours, exact)
    assert len(calls) == times * 3


def test_plans_count_what_it_computes_and_holds(monkeypatch):
    """On meta tensors: all pairs, five products for two in the backward pass; no gradients of more than a piece are alive."""
    sizes = {}
    for piece in (100, 1000):
        monkeypatch.setattr(apart, "PIECE", piece)
        (q, k, v), past = drawn((1000,), dtype=torch.bfloat16)
        own, past = [x.to("meta").requires_grad_() for x in (q, k, v)], [tuple(x.to("meta") for x in past[0])]
        with Trace() as trace:
            for tensor in (*own, *past[0]):
                trace.given(tensor)
            out = attention_apart(*own, past)
            sizes[piece] = trace.peak()
            torch.autograd.grad(out, own, torch.empty_like(out))
        pairs = 5 * 1005
        assert trace.work.attention == attention_flops(FORWARD_OP, (own[0], pairs))
        assert trace.work.attention_backward == attention_flops(BACKWARD_OP, (own[0], pairs))
        sizes[piece] = trace.peak() - sizes[piece]
    assert sizes[1000] - sizes[100] == 900 * 3 * 8 * 2 * 2


def test_what_does_not_fit_is_named():
    (q, k, v), past = drawn()
    with pytest.raises(ShapeError, match=r"equal B, H and D; found q \[1, 5, 3, 8\], k \[1, 4, 2, 8\]"):
        attention_apart(q, k, v, [(past[0][0][:, :, :2], past[0][1][:, :, :2])])
    with pytest.raises(SpecError, match="no gradient, and these ask for it"):
        attention_apart(q, k, v, [(past[0][0].requires_grad_(), past[0][1])])


def test_its_output_is_worth_keeping():
    from sftk.functional.attention import attention_operators

    assert APART_OP in attention_operators()
