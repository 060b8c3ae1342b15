"""Attention over cached keys and a pass's own ones where they lie: no joined copy, and no gradient for what asks for none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sftk.errors import ShapeError, SpecError
from sftk.functional.flash import flash, flash_backward
from sftk.functional.meta_attention import meta_backward, meta_forward
from sftk.functional.split_kv import merge_partials

PIECE = 16384
"""Cached keys for which a backward pass holds gradients at once, before they are dropped. Some 128 tiles of 128 keys in each
head keep a GPU busy; at 1536 channels in half precision keys and values of a piece are 0.1 GB."""


def attention_apart(q: Tensor, k: Tensor, v: Tensor, past: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Softmax attention over cached keys and own ones, without a copy that joins them; the cached ones get no gradient.

    Queries attend to each chunk and to the own keys on their own, and the outputs are joined by their log-sum-exps. With the
    joined output and log-sum-exp, FlashAttention's backward pass over any of the keys gives their part of the queries'
    gradient, so it goes through the cached ones a `PIECE` at a time, and what it finds for their keys and values is dropped.

    Args:
        q: [B, Lq, H, D]; k, v: [B, L, H, D], of the pass itself. On CUDA in half precision, for FlashAttention 4.
        past: k, v of each cached chunk, [B, P_i, H, D], at least one chunk.

    Returns:
        [B, Lq, H, D], q's dtype. One operator, which compiled blocks and activation checkpoints know.

    Raises:
        ShapeError: axes do not fit. SpecError: something cached asks for gradient.

    Source: FlashAttention-2, arXiv 2307.08691, algorithm 2 (no tile of keys needs another); the join as in `merge_partials`.

    Example:
        >>> q, k, v, old_k, old_v = torch.randn(5, 1, 6, 2, 8).unbind()
        >>> joined = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        >>> whole = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, *joined)))
        >>> torch.allclose(attention_apart(q, k, v, [(old_k, old_v)]), whole.transpose(1, 2), atol=1e-5)
        True
    """
    for keys, values in (*past, (k, v)):
        if keys.shape != values.shape or (keys.shape[0], *keys.shape[2:]) != (q.shape[0], *q.shape[2:]):
            shapes = f"q {list(q.shape)}, k {list(keys.shape)}, v {list(values.shape)}"
            raise ShapeError(f"attention takes [B, L, H, D] with equal B, H and D; found {shapes}")
    past_k, past_v = [keys for keys, _ in past], [values for _, values in past]
    if any(x.requires_grad for x in (*past_k, *past_v)):
        raise SpecError("attention apart gives cached keys and values no gradient, and these ask for it; detach or join them")
    return _forward_op(q, k, v, past_k, past_v)[0]


def _forward(q: Tensor, k: Tensor, v: Tensor, past_k: Sequence[Tensor], past_v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The output, contiguous, and the log-sum-exp [B, H, Lq] over all keys."""
    parts = (_attend(q, *pair) for pair in zip((*past_k, k), (*past_v, v), strict=True))
    outs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
    return merge_partials(outs, lses), lses.logsumexp(dim=0)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Sequence[Tensor], past_v: Sequence[Tensor], out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, summed in float32 (or float64), and of the own keys and values."""
    grad = grad.contiguous()
    dq, dk, dv = _gradients(grad, q, k, v, out, lse)
    total = dq.to(torch.promote_types(dq.dtype, torch.float32))
    del dq
    for keys, values in _pieces(past_k, past_v):
        total += _gradients(grad, q, keys, values, out, lse)[0]
    return total.to(q.dtype), dk, dv


def _pieces(past_k: Sequence[Tensor], past_v: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of at most `PIECE` keys and values, of each chunk in pieces of the same size."""
    for keys, values in zip(past_k, past_v, strict=True):
        count = -(-keys.shape[1] // PIECE)
        yield from zip(keys.tensor_split(count, dim=1), values.tensor_split(count, dim=1), strict=True)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, Lq, H, D] and its log-sum-exp [B, H, Lq], by the device's FlashAttention."""
    if q.is_cuda:
        return flash(q, k, v)
    if q.is_meta:
        return meta_forward(q, k, v, q.shape[1] * k.shape[1])
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2), lse


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, and of k and v, which are some of the keys and values that `out` and `lse` are over; contiguous."""
    if q.is_cuda:
        return flash_backward(grad, q, k, v, out, lse)
    if q.is_meta:
        return meta_backward(grad, q, k, v, out, lse, q.shape[1] * k.shape[1])
    heads = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, lse, 0.0, False)
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in found)
    return dq, dk, dv


_forward_op = torch.library.custom_op("sftk::attention_apart", mutates_args=())(_forward)
_backward_op = torch.library.custom_op("sftk::attention_apart_backward", mutates_args=())(_backward)

APART_OP = _forward_op._opoverload
BODIES: Mapping[Any, Callable[..., Any]] = {APART_OP: _forward, _backward_op._opoverload: _backward}
"""The operators and what they do, for who counts on meta tensors."""


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, past_k: Sequence[Tensor], past_v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=wide)


@_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Sequence[Tensor], past_v: Sequence[Tensor], out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, past_k, past_v = inputs
    ctx.chunks = len(past_k)
    ctx.save_for_backward(q, k, v, *output, *past_k, *past_v)


def _vjp(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    """Of the output alone: nothing here differentiates the log-sum-exp."""
    q, k, v, out, lse, *past = ctx.saved_tensors
    chunks = ctx.chunks
    found = _backward_op(grad, q, k, v, past[:chunks], past[chunks:], out, lse)
    return *found, [None] * chunks, [None] * chunks


_forward_op.register_autograd(_vjp, setup_context=_remember)
