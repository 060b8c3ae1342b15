# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""The softmax over tiles of keys with fp8 products, for any device that has them."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sftk.functional.fp8_attention import TILE

QUERIES, WARPS, STAGES = 64, 4, 3
"""Queries of a program; two programs share a multiprocessor, and one multiplies while the other takes exponentials."""
RESIDENT = 2
"""Programs on a multiprocessor."""
SHIFT = 8.0
"""Probabilities are rounded 2^8 times as large, which makes the most of e4m3's range of 448."""


@triton.jit
def _tile(
    codes, keys, values, k_scales, v_scales, factor, batch, row, tile, tiles, tokens, peak, total, acc,
    heads: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Takes a tile of keys into the running maximum, the sum of exponentials and the weighted sum of values."""
    k = keys.load([(batch * tiles + tile) * N, row % heads * D])
    s = tl.dot(codes, k.T)
    by = factor * tl.load(k_scales + row * tiles + tile)
    v_scale = tl.load(v_scales + row * tiles + tile)
    if RAGGED:
        s = tl.where((tile * N + tl.arange(0, N) < tokens)[None, :], s, -1e30)
    # The tile's values are to be multiplied by their scale: its logarithm joins the exponent, and leaves the sum.
    raised = tl.math.log2(v_scale)
    higher = tl.maximum(peak, tl.max(s, 1) * by + raised)
    p = tl.math.exp2(s * by[:, None] - (higher - SHIFT - raised)[:, None])
    fade = tl.math.exp2(peak - higher)
    total = total * fade + tl.sum(p, 1) / v_scale
    v = values.load([row * D, tile * N])
    # The order of `fp8_codes.in_order`, in which no probability has to move to another thread.
    p = tl.reshape(tl.permute(tl.reshape(p.to(v.dtype), [M, N // 16, 2, 4, 2]), (0, 1, 3, 2, 4)), [M, N])
    # Tensor cores of Hopper sum fp8 products with 14 bits: only a tile's are left to them, float32 adds up the tiles.
    return higher, total, acc * fade[:, None] + tl.dot(p, v.T)


@triton.jit
def _attend(
    q, keys, values, q_scales, k_scales, v_scales, out, lse, queries, tokens, tiles, part_tiles, scale,
    heads: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    query, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    real = (query < queries)[:, None]
    at = (batch * queries + query[:, None]).to(tl.int64) * (heads * D) + head * D + channel[None, :]
    codes = tl.load(q + at, real, 0.0)
    factor = tl.load(q_scales + row.to(tl.int64) * queries + query, query < queries, 1.0) * scale

    peak = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    first = part * part_tiles
    last = tl.minimum(first + part_tiles, tiles)
    full = tl.minimum(last, tokens // N)
    for tile in tl.range(first, full):
        peak, total, acc = _tile(
            codes, keys, values, k_scales, v_scales, factor, batch, row, tile, tiles, tokens, peak, total, acc,
            heads, D, M, N, SHIFT, False,
        )  # fmt: skip
    if RAGGED:  # noqa: SIM102 (known when the kernel is compiled)
        if full < last:
            peak, total, acc = _tile(
                codes, keys, values, k_scales, v_scales, factor, batch, row, full, tiles, tokens, peak, total, acc,
                heads, D, M, N, SHIFT, True,
            )  # fmt: skip
    found = acc * (1 / total)[:, None]
    samples = tl.num_programs(1) // heads
    place = ((part * samples + batch) * queries + query[:, None]).to(tl.int64) * (heads * D) + head * D + channel[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), real)
    ends = peak + tl.math.log2(total) - SHIFT
    tl.store(lse + (part * tl.num_programs(1) + row).to(tl.int64) * queries + query, ends, query < queries)


def run(
    codes: Tensor, q_scales: Tensor, k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor,
    outs: Tensor, lses: Tensor, tokens: int, part_tiles: int,
) -> None:  # fmt: skip
    """Attends, see `fp8_attention.Form`."""
    parts, batch, queries, heads, dim = outs.shape
    tiles = k_scales.shape[2]
    keys = TensorDescriptor.from_tensor(k_codes.view(-1, heads * dim), [TILE, dim])
    values = TensorDescriptor.from_tensor(v_codes.view(-1, tiles * TILE), [dim, TILE])
    _attend[(triton.cdiv(queries, QUERIES), heads * batch, parts)](
        codes, keys, values, q_scales, k_scales, v_scales, outs, lses, queries, tokens, tiles, part_tiles,
        math.log2(math.e) / math.sqrt(dim), heads=heads, D=dim, M=QUERIES, N=TILE, SHIFT=SHIFT, RAGGED=bool(tokens % TILE),
        num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip
