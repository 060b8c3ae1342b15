# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""Layer norm and its modulation by frame, of a tensor or of its sum with a gated residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftk.functional.kernels.launch import programs_for, warps_for

ROWS = 4
"""Tokens of a program of the forward pass: one after the other, with their frame's gate, shift and scale in registers."""
LEAST_ROWS = 16
"""Tokens of a program of the backward pass, at least: it writes three sums for each channel."""
PROGRAMS = 4
"""On each processor."""


@triton.jit
def _frame(gate, scale, width: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr):
    """A program's frame, the channels and which of them are real, and what the norm and the residual are scaled by."""
    frame = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    real, table = channel < width, frame * width + channel
    one = 1 + tl.load(scale + table, real, 0.0).to(tl.float32)
    factor = one
    if GATED:
        factor = tl.load(gate + table, real, 0.0).to(tl.float32)
    return frame, channel, real, one, factor


@triton.jit
def _forward(
    x, y, gate, shift, scale, x_out, out, mean_out, rstd_out, tokens, eps, span,
    width: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    frame, channel, real, one, factor = _frame(gate, scale, width, GATED, WIDTH)
    offset = tl.load(shift + (frame * width + channel), real, 0.0).to(tl.float32)
    first = tl.program_id(0) * span
    for place in range(first, tl.minimum(first + span, tokens)):
        row = frame * tokens + place
        at = row * width + channel
        value = tl.load(x + at, real, 0.0).to(tl.float32)
        if ADDED:
            added = tl.load(y + at, real, 0.0).to(tl.float32)
            if GATED:
                added *= factor
            rounded = (value + added).to(x.dtype.element_ty)
            tl.store(x_out + at, rounded, real)
            value = rounded.to(tl.float32)
        mean = tl.sum(value, 0) / width
        value = tl.where(real, value - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        tl.store(out + at, (value * rstd * one + offset).to(x.dtype.element_ty), real)
        tl.store(mean_out + row, mean)
        tl.store(rstd_out + row, rstd)


@triton.jit
def _backward(
    grad_x, grad, x, y, gate, scale, mean, rstd, dx, dy, partial, tokens, span,
    width: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    frame, channel, real, one, factor = _frame(gate, scale, width, GATED, WIDTH)
    d_shift = tl.zeros([WIDTH], tl.float32)
    d_scale = tl.zeros([WIDTH], tl.float32)
    d_gate = tl.zeros([WIDTH], tl.float32)
    first = tl.program_id(0) * span
    for place in range(first, tl.minimum(first + span, tokens)):
        row = frame * tokens + place
        at = row * width + channel
        g = tl.load(grad + at, real, 0.0).to(tl.float32)
        value = tl.load(x + at, real, 0.0).to(tl.float32)
        if ADDED:
            through = tl.load(grad_x + at, real, 0.0).to(tl.float32)
        if GATED:
            added = tl.load(y + at, real, 0.0).to(tl.float32)
        r = tl.load(rstd + row)
        normed = tl.where(real, (value - tl.load(mean + row)) * r, 0.0)
        d_shift += g
        d_scale += g * normed
        g = g * one
        first_mean, second_mean = tl.sum(g, 0) / width, tl.sum(g * normed, 0) / width
        total = r * (g - first_mean - normed * second_mean)
        if ADDED:
            total += through
        rounded = total.to(x.dtype.element_ty)
        tl.store(dx + at, rounded, real)
        if GATED:
            g = rounded.to(tl.float32)
            d_gate += g * added
            tl.store(dy + at, (g * factor).to(x.dtype.element_ty), real)
    at = (frame * tl.num_programs(0) + tl.program_id(0)) * width + channel
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * width
    tl.store(partial + at, d_shift, real)
    tl.store(partial + plane + at, d_scale, real)
    if GATED:
        tl.store(partial + 2 * plane + at, d_gate, real)


def _run(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, rows: int, warps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, shift, scale = (t.contiguous() for t in (x, shift, scale))
    out, mean, rstd = _outputs(x)
    total = x if y is None else torch.empty_like(x)
    frames = shift.shape[0] * shift.shape[1]
    tokens = x.shape[0] * x.shape[1] // frames
    _forward[(triton.cdiv(tokens, rows), frames)](
        x, _or(y, x), _or(gate, shift), shift, scale, total, out, mean, rstd, tokens, eps, rows,
        **_sizes(x, y, gate), num_warps=warps,
    )  # fmt: skip
    return total, out, mean, rstd


def _run_backward(
    grad_x: Tensor | None, grad: Tensor, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, mean: Tensor,
    rstd: Tensor, warps: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, x, scale = (t.contiguous() for t in (grad, x, scale))
    batch, frames, width = scale.shape
    tokens = x.shape[1] // frames
    span = max(LEAST_ROWS, triton.cdiv(batch * x.shape[1], programs_for(x.device, PROGRAMS)))
    chunks = triton.cdiv(tokens, span)
    dx, dy, _ = _gradients(x, gate, scale)
    partial = torch.empty(2 + (gate is not None), batch, frames, chunks, width, dtype=torch.float32, device=x.device)
    _backward[(chunks, batch * frames)](
        _or(grad_x, grad), grad, x, _or(y, x), _or(gate, scale), scale, mean, rstd, dx, dy, partial, tokens, span,
        **_sizes(x, grad_x, gate), num_warps=warps,
    )  # fmt: skip
    return dx, dy, partial.sum(3)


def _or(tensor: Tensor | None, unread: Tensor) -> Tensor:
    return unread if tensor is None else tensor.contiguous()


def _sizes(x: Tensor, added: Tensor | None, gate: Tensor | None) -> dict[str, int | bool]:
    width = x.shape[2]
    return {"width": width, "ADDED": added is not None, "GATED": gate is not None, "WIDTH": triton.next_power_of_2(width)}


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _gradients(x: Tensor, gate: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = x.new_empty(x.shape if gate is not None else (0,))
    return x.new_empty(x.shape), dy, scale.new_empty((2 + (gate is not None), *scale.shape), dtype=torch.float32)


@torch.library.custom_op("sftk::residual_norm", mutates_args=())
def _op(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, rows: int, warps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(x, y, gate, shift, scale, eps, rows, warps)


@_op.register_fake
def _(x, y, gate, shift, scale, eps, rows, warps):
    return x.new_empty(x.shape), *_outputs(x)


@torch.library.custom_op("sftk::residual_norm_backward", mutates_args=())
def _backward_op(
    grad_x: Tensor, grad: Tensor, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor,
    warps: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _run_backward(grad_x, grad, x, y, gate, scale, mean, rstd, warps)


@_backward_op.register_fake
def _(grad_x, grad, x, y, gate, scale, mean, rstd, warps):
    return _gradients(x, gate, scale)


def _keep(ctx, inputs, output):
    _, y, gate, shift, scale, _, _, ctx.warps = inputs
    ctx.shift_dtype = shift.dtype
    x, _, mean, rstd = output
    ctx.save_for_backward(x, None if gate is None else y, gate, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _gradient(ctx, grad_x, grad, *_):
    x, y, gate, scale, mean, rstd = ctx.saved_tensors
    dx, dy, sums = _backward_op(grad_x, grad, x, y, gate, scale, mean, rstd, ctx.warps)
    d_gate = None if gate is None else sums[2].to(gate.dtype)
    return dx, dx if gate is None else dy, d_gate, sums[0].to(ctx.shift_dtype), sums[1].to(scale.dtype), None, None, None


_op.register_autograd(_gradient, setup_context=_keep)


@torch.library.custom_op("sftk::modulated_norm", mutates_args=())
def _alone_op(x: Tensor, shift: Tensor, scale: Tensor, eps: float, rows: int, warps: int) -> tuple[Tensor, Tensor, Tensor]:
    return _run(x, None, None, shift, scale, eps, rows, warps)[1:]


@_alone_op.register_fake
def _(x, shift, scale, eps, rows, warps):
    return _outputs(x)


@torch.library.custom_op("sftk::modulated_norm_backward", mutates_args=())
def _alone_backward_op(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, warps: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, _, sums = _run_backward(None, grad, x, None, None, scale, mean, rstd, warps)
    return dx, sums


@_alone_backward_op.register_fake
def _(grad, x, scale, mean, rstd, warps):
    dx, _, sums = _gradients(x, None, scale)
    return dx, sums


def _keep_alone(ctx, inputs, output):
    x, shift, scale, _, _, ctx.warps = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient_alone(ctx, grad, *_):
    x, scale, mean, rstd = ctx.saved_tensors
    dx, sums = _alone_backward_op(grad, x, scale, mean, rstd, ctx.warps)
    return dx, sums[0].to(ctx.shift_dtype), sums[1].to(scale.dtype), None, None, None


_alone_op.register_autograd(_gradient_alone, setup_context=_keep_alone)


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, *, rows: int = ROWS, warps: int = 0
) -> tuple[Tensor, Tensor]:
    """`x + gate y`, and `(1 + scale) layer_norm(x + gate y) + shift`; rounded where the model rounds.

    Args:
        x, y: [B, L, width] of one dtype.
        gate, shift, scale: [B, F, width], of each frame's L / F tokens. Without a gate it is `x + y`. A norm with weights
            has one frame: `scale` is its weight less one, `shift` its bias.
        rows: of a program, one after the other. warps: of a program; 0 are chosen by the width.

    Returns:
        [B, L, width] each, of x's dtype.

    Source: adaptive layer norm, arXiv 2212.09748, section 3.2.
    """
    warps = warps or warps_for(triton.next_power_of_2(x.shape[-1]))
    total, normed, *_ = _op(x, y, gate, shift, scale, eps, rows, warps)
    return total, normed


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, rows: int = ROWS, warps: int = 0) -> Tensor:
    """`(1 + scale) layer_norm(x) + shift`; rounded where the model rounds.

    Args:
        x: [B, L, width].
        shift, scale: [B, F, width], of each frame's L / F tokens.
        rows: of a program, one after the other. warps: of a program; 0 are chosen by the width.

    Returns:
        [B, L, width], x's dtype.

    Source: adaptive layer norm, arXiv 2212.09748, section 3.2.
    """
    return _alone_op(x, shift, scale, eps, rows, warps or warps_for(triton.next_power_of_2(x.shape[-1])))[0]
