# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""RMS norm over the width and rotation by position, of queries and keys at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftk.functional.kernels.launch import programs_for, warps_for

ROWS = 4
"""Tokens of a program of the forward pass: one after the other, with the weights in registers."""
LEAST_ROWS = 8
"""Tokens of a program of the backward pass, at least: it writes a sum for each channel."""
PROGRAMS = 4
"""On each processor, for queries and for keys."""


@triton.jit
def _turn(x, cos, sin, HEADS: tl.constexpr, DIM: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [HEADS, DIM // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [HEADS, DIM])


@triton.jit
def _tables(cos, sin, row, tokens, dim: tl.constexpr, DIM: tl.constexpr):
    pair = tl.arange(0, DIM // 2)[None, :]
    at = (row % tokens) * (dim // 2) + pair
    return tl.load(cos + at, pair < dim // 2, 0.0), tl.load(sin + at, pair < dim // 2, 0.0)


@triton.jit
def _forward_rows(
    x, weight, cos, sin, out, rstd_out, rows, tokens, eps, span,
    heads: tl.constexpr, dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    channel, real = h * dim + d, (h < heads) & (d < dim)
    w = tl.load(weight + channel, real, 0.0).to(x.dtype.element_ty).to(tl.float32)
    first = tl.program_id(0) * span
    for row in range(first, tl.minimum(first + span, rows)):
        at = tl.cast(row, tl.int64) * (heads * dim) + channel
        y = tl.load(x + at, real, 0.0).to(tl.float32)
        c, s = _tables(cos, sin, row, tokens, dim, DIM)
        rstd = tl.rsqrt(tl.sum(tl.sum(y * y, 1), 0) / (heads * dim) + eps)
        normed = (y * rstd).to(x.dtype.element_ty).to(tl.float32)
        turned = _turn((normed * w).to(x.dtype.element_ty).to(tl.float32), c, s, HEADS, DIM)
        tl.store(out + at, turned.to(x.dtype.element_ty), real)
        tl.store(rstd_out + row, rstd)


@triton.jit
def _forward(
    q, k, weight_q, weight_k, cos, sin, q_out, k_out, rstd_q, rstd_k, rows, tokens, eps, span,
    heads: tl.constexpr, dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _forward_rows(q, weight_q, cos, sin, q_out, rstd_q, rows, tokens, eps, span, heads, dim, HEADS, DIM)
    else:
        _forward_rows(k, weight_k, cos, sin, k_out, rstd_k, rows, tokens, eps, span, heads, dim, HEADS, DIM)


@triton.jit
def _backward_rows(
    grad, x, weight, cos, sin, rstd, dx, partial, rows, tokens, span,
    heads: tl.constexpr, dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    channel, real = h * dim + d, (h < heads) & (d < dim)
    w = tl.load(weight + channel, real, 0.0).to(x.dtype.element_ty).to(tl.float32)
    total = tl.zeros([HEADS, DIM], tl.float32)
    first = tl.program_id(0) * span
    for row in range(first, tl.minimum(first + span, rows)):
        at = tl.cast(row, tl.int64) * (heads * dim) + channel
        g = tl.load(grad + at, real, 0.0).to(tl.float32)
        y = tl.load(x + at, real, 0.0).to(tl.float32)
        r = tl.load(rstd + row)
        c, s = _tables(cos, sin, row, tokens, dim, DIM)
        g = _turn(g, c, -s, HEADS, DIM)
        normed = y * r
        total += g * normed.to(x.dtype.element_ty).to(tl.float32)
        g = g * w
        mean = tl.sum(tl.sum(g * normed, 1), 0) / (heads * dim)
        tl.store(dx + at, (r * (g - normed * mean)).to(x.dtype.element_ty), real)
    tl.store(partial + tl.program_id(0) * (heads * dim) + channel, total, real)


@triton.jit
def _backward(
    grad_q, grad_k, q, k, weight_q, weight_k, cos, sin, rstd_q, rstd_k, dq, dk, partial_q, partial_k, rows, tokens, span,
    heads: tl.constexpr, dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _backward_rows(
            grad_q, q, weight_q, cos, sin, rstd_q, dq, partial_q, rows, tokens, span, heads, dim, HEADS, DIM
        )  # fmt: skip
    else:
        _backward_rows(
            grad_k, k, weight_k, cos, sin, rstd_k, dk, partial_k, rows, tokens, span, heads, dim, HEADS, DIM
        )  # fmt: skip


def _sizes(heads: int, dim: int) -> dict[str, int]:
    return {"heads": heads, "dim": dim, "HEADS": triton.next_power_of_2(heads), "DIM": triton.next_power_of_2(dim)}


@torch.library.custom_op("sftk::norm_rope", mutates_args=())
def _op(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, rows: int, warps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, cos, sin = (t.contiguous() for t in (q, k, cos, sin))
    q_out, k_out, rstd_q, rstd_k = _outputs(q, cos)
    heads, dim = q_out.shape[2:]
    grid = (triton.cdiv(rstd_q.numel(), rows), 2)
    _forward[grid](
        q, k, weight_q, weight_k, cos, sin, q_out, k_out, rstd_q, rstd_k, rstd_q.numel(), q.shape[1], eps, rows,
        **_sizes(heads, dim), num_warps=warps,
    )  # fmt: skip
    return q_out, k_out, rstd_q, rstd_k


def _outputs(q: Tensor, cos: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim = 2 * cos.shape[-1]
    turned = (*q.shape[:2], q.shape[2] // dim, dim)
    rstd = q.new_empty(q.shape[:2], dtype=torch.float32)
    return q.new_empty(turned), q.new_empty(turned), rstd, torch.empty_like(rstd)


@_op.register_fake
def _(q, k, weight_q, weight_k, cos, sin, eps, rows, warps):
    return _outputs(q, cos)


@torch.library.custom_op("sftk::norm_rope_backward", mutates_args=())
def _backward_op(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    rstd_q: Tensor, rstd_k: Tensor, warps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_q, grad_k, q, k, cos, sin = (t.contiguous() for t in (grad_q, grad_k, q, k, cos, sin))
    span = max(LEAST_ROWS, triton.cdiv(rstd_q.numel(), programs_for(q.device, PROGRAMS)))
    programs = triton.cdiv(rstd_q.numel(), span)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    partial_q, partial_k = torch.empty(2, programs, q.shape[2], dtype=torch.float32, device=q.device).unbind()
    _backward[(programs, 2)](
        grad_q, grad_k, q, k, weight_q, weight_k, cos, sin, rstd_q, rstd_k, dq, dk, partial_q, partial_k,
        rstd_q.numel(), q.shape[1], span, **_sizes(*grad_q.shape[2:]), num_warps=warps,
    )  # fmt: skip
    return dq, dk, partial_q.sum(0).to(weight_q.dtype), partial_k.sum(0).to(weight_k.dtype)


@_backward_op.register_fake
def _(grad_q, grad_k, q, k, weight_q, weight_k, cos, sin, rstd_q, rstd_k, warps):
    shapes = (q.new_empty(q.shape), k.new_empty(k.shape))
    return *shapes, weight_q.new_empty(weight_q.shape), weight_k.new_empty(weight_k.shape)


def _keep(ctx, inputs, output):
    *tensors, _, _, ctx.warps = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _gradient(ctx, grad_q, grad_k, *_):
    found = _backward_op(grad_q, grad_k, *ctx.saved_tensors, ctx.warps)
    return *found, None, None, None, None, None


_op.register_autograd(_gradient, setup_context=_keep)


def norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    rows: int = ROWS,
    warps: int = 0,
) -> tuple[Tensor, Tensor]:
    """`rotate(rms_norm(q))` and the same of k; rounded where the model rounds, its gradient only at its end.

    Args:
        q, k: [B, L, width] of one dtype.
        weight_q, weight_k: [width], of the norms.
        cos, sin: [L, 1, D / 2].
        rows: of a program, one after the other. warps: of a program; 0 are chosen by the width.

    Returns:
        [B, L, heads, D] each, of q's dtype.

    Source: RMS norm, arXiv 1910.07467, eq. 4; RoFormer, arXiv 2104.09864, eq. 15.
    """
    dim = 2 * cos.shape[-1]
    tile = triton.next_power_of_2(q.shape[-1] // dim) * triton.next_power_of_2(dim)
    q_out, k_out, *_ = _op(q, k, weight_q, weight_k, cos, sin, eps, rows, warps or warps_for(tile))
    return q_out, k_out
