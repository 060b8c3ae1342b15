# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""GELU after a linear layer, whose gradient comes with that of the layer's bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sftk.functional.kernels.launch import programs_for

ROWS, COLUMNS, WARPS = 8, 256, 4
"""Of a tile: rows of 512 bytes in half precision."""


@triton.jit
def _backward(
    grad, x, dx, partial, rows, span, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = column < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    end = tl.minimum((tl.program_id(1) + 1) * span, rows)
    for first in range(tl.program_id(1) * span, end, ROWS):
        row = (first + tl.arange(0, ROWS).to(tl.int64))[:, None]
        at, inside = row * width + column, (row < end) & real
        z = tl.load(x + at, inside, 0.0).to(tl.float32)
        g = tl.load(grad + at, inside, 0.0).to(tl.float32)
        # (1 + tanh u) / 2 is the logistic function of 2 u, u = sqrt(2 / pi) (z + 0.044715 z^3).
        slope = 1.5957691216057308 * (1 + 0.134145 * z * z)
        half = 1 / (1 + tl.exp(-1.5957691216057308 * z * (1 + 0.044715 * z * z)))
        rounded = (g * half * (1 + z * (1 - half) * slope)).to(x.dtype.element_ty)
        tl.store(dx + at, rounded, inside)
        total += rounded.to(tl.float32)
    tl.store(partial + tl.program_id(1) * width + column, tl.sum(total, 0)[None], real)


@torch.library.custom_op("sftk::gelu_bias_backward", mutates_args=())
def _backward_op(grad: Tensor, x: Tensor, rows: int, columns: int, warps: int) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    width = x.shape[-1]
    tokens, across = x.numel() // width, triton.cdiv(width, columns)
    span = rows * triton.cdiv(triton.cdiv(tokens, triton.cdiv(programs_for(x.device, 8), across)), rows)
    chunks = triton.cdiv(tokens, span)
    dx, partial = torch.empty_like(x), torch.empty(chunks, width, dtype=torch.float32, device=x.device)
    _backward[(across, chunks)](grad, x, dx, partial, tokens, span, width=width, ROWS=rows, COLUMNS=columns, num_warps=warps)
    return dx, partial.sum(0)


@_backward_op.register_fake
def _(grad, x, rows, columns, warps):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:], dtype=torch.float32)


def gelu_bias_backward(
    grad: Tensor, x: Tensor, *, rows: int = ROWS, columns: int = COLUMNS, warps: int = WARPS
) -> tuple[Tensor, Tensor]:
    """The gradient of `gelu(x)`, in its tanh form, and its sum over all rows.

    Args:
        grad, x: [..., width] of one dtype; x is what GELU was applied to.
        rows, columns, warps: of a tile.

    Returns:
        [..., width] of x's dtype; [width] float32.

    Source: GELU, arXiv 1606.08415, section 2.
    """
    return _backward_op(grad, x, rows, columns, warps)


@torch.library.custom_op("sftk::gelu_bias", mutates_args=())
def _op(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@_op.register_fake
def _(x, bias):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    x, bias = inputs
    ctx.dtype = bias.dtype
    ctx.save_for_backward(x)


def _gradient(ctx, grad):
    dx, sums = gelu_bias_backward(grad, *ctx.saved_tensors)
    return dx, sums.to(ctx.dtype)


_op.register_autograd(_gradient, setup_context=_keep)


def gelu_bias(x: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x)` in its tanh form, where x holds the bias as a constant: `gelu_bias(F.linear(y, weight, bias.detach()), bias)`.

    Args:
        x: [..., width]. bias: [width], which gets its gradient here.

    Returns:
        [..., width], x's dtype.

    Source: GELU, arXiv 1606.08415, section 2.
    """
    return _op(x, bias)
