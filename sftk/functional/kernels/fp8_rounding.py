# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""Rounding to fp8: a scale for each row and its codes, of a matrix or of its transpose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftk.functional.packed import DTYPES, LARGEST, SMALLEST_SCALE, Packed

TILE = (128, 64)
"""Rows and columns of a tile that is turned: it writes 128 codes of each column in one piece."""
ELEMENTS = 128
"""Of a row that a thread of `_by_row` holds at most: few warps for a row wait less for each other than many."""
CHUNKS = 16
"""Parts of the rows of which each column's largest value is sought side by side."""


@triton.jit
def _by_row(
    values, codes, scales, largest, smallest,
    width: tl.constexpr, WIDTH: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    at = row.to(tl.int64) * width + channel
    value = tl.load(values + at, channel < width, 0.0).to(tl.float32)
    if GELU:
        # (1 + tanh u) / 2 is the logistic function of 2 u, u = sqrt(2 / pi) (z + 0.044715 z^3); here with powers of two.
        value = value / (1 + tl.math.exp2(value * (-2.302208198144325 - 0.1029432395800235 * value * value)))
        value = value.to(values.dtype.element_ty).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value), 0), largest), smallest)
    tl.store(codes + at, (value * tl.div_rn(1.0, scale)).to(codes.dtype.element_ty), channel < width)
    tl.store(scales + row, scale)


@triton.jit
def _largest_of_columns(
    values, partial, rows, span, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.zeros([COLUMNS], tl.float32)
    end = tl.minimum((tl.program_id(1) + 1) * span, rows)
    for first in range(tl.program_id(1) * span, end, ROWS):
        row = (first + tl.arange(0, ROWS).to(tl.int64))[:, None]
        inside = (row < end) & (column < width)[None, :]
        value = tl.load(values + row * width + column[None, :], inside, 0.0).to(tl.float32)
        found = tl.maximum(found, tl.max(tl.abs(value), 0))
    tl.store(partial + tl.program_id(1) * width + column, found, column < width)


@triton.jit
def _turned(
    values, partial, codes, scales, rows, largest, smallest,
    width: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    chunk = tl.arange(0, CHUNKS)[:, None]
    found = tl.max(tl.load(partial + chunk * width + column[None, :], (column < width)[None, :], 0.0), 0)
    scale = tl.maximum(tl.div_rn(found, largest), smallest)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(values + at, inside, 0.0).to(tl.float32)
    coded = (value * tl.div_rn(1.0, scale)[None, :]).to(codes.dtype.element_ty)
    turned_at = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(codes + turned_at, tl.trans(coded), (column < width)[:, None] & (row < rows)[None, :])
    if tl.program_id(1) == 0:
        tl.store(scales + column, scale, column < width)


def round_rows(values: Tensor, *, gelu: bool = False, warps: int = 0) -> Packed:
    """What `pack(values, "fp8")` gives, but for values that lie between two codes to float32's rounding.

    Each value is read once.

    Args:
        values: [M, K], floating-point.
        gelu: round `gelu(values)`, in its tanh form.
        warps: of a program, which has a row; 0 are chosen by the width.

    Returns:
        Codes [M, K], and scales [M, 1] float32.

    Source: row-wise scaling, arXiv 2209.05433, section 3.
    """
    values = values.contiguous()
    rows, width = values.shape
    found, tile = _empty(rows, width, values), triton.next_power_of_2(width)
    sizes = {"width": width, "WIDTH": tile, "GELU": gelu, "num_warps": warps or max(1, min(16, tile // (32 * ELEMENTS)))}
    _by_row[(rows,)](values, *found[:2], LARGEST["fp8"], SMALLEST_SCALE, **sizes)
    return found


def round_columns(values: Tensor, *, rows: int = TILE[0], columns: int = TILE[1], warps: int = 8) -> Packed:
    """What `pack(values.t(), "fp8")` gives, as `round_rows` does; values are read twice, and no transpose of them is made.

    Args:
        values: [N, K], floating-point.
        rows, columns: of a tile. warps: of a program.

    Returns:
        Codes [K, N], contiguous, and scales [K, 1] float32.

    Source: row-wise scaling, arXiv 2209.05433, section 3.
    """
    values = values.contiguous()
    height, width = values.shape
    partial = torch.empty(CHUNKS, width, dtype=torch.float32, device=values.device)
    across = triton.cdiv(width, columns)
    sizes = {"width": width, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
    _largest_of_columns[(across, CHUNKS)](values, partial, height, triton.cdiv(height, CHUNKS), **sizes)
    found = _empty(width, height, values)
    _turned[(across, triton.cdiv(height, rows))](
        values, partial, *found[:2], height, LARGEST["fp8"], SMALLEST_SCALE, CHUNKS=CHUNKS, **sizes
    )  # fmt: skip
    return found


def _empty(rows: int, width: int, like: Tensor) -> Packed:
    codes = torch.empty(rows, width, dtype=DTYPES["fp8"], device=like.device)
    return Packed(codes, torch.empty(rows, 1, dtype=torch.float32, device=like.device))
