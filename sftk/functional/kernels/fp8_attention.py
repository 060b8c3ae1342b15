# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""Attention with fp8 products: rounding of keys and values, and the softmax over tiles of them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sftk.functional.fp8_attention import TILE as KEYS
from sftk.functional.kernels.launch import programs_for

QUERIES, WARPS, STAGES = 64, 4, 3
"""Queries of a program; two programs share a multiprocessor, and one multiplies while the other takes exponentials."""
RESIDENT = 2
"""Programs on a multiprocessor."""
MOST_PARTS = 4
"""Parts of the keys at most: each writes an output of its own."""
LEAST_TILES = 8
"""Tiles of keys in a part at least."""
JOINING = 0.02
"""What joining parts costs, of attention's time."""
ROWS = 32
"""Rows, a token's head each, of a program that rounds queries or joins parts."""
ROUND_WARPS = 8
"""Of a program that rounds a tile of keys and of values."""
CODES, LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max
SHIFT = 8.0
"""Probabilities are rounded 2^8 times as large, which makes the most of e4m3's range of 448."""


@triton.jit
def _scaled(x, LARGEST: tl.constexpr):
    """A tile's values up to the largest code, and their scale."""
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / LARGEST, 1e-30)
    return x * (1 / scale), scale


@triton.jit
def _round(
    k, v, k_codes, v_codes, k_scales, v_scales, tokens, padded, k_batch, v_batch, k_token, v_token,
    heads: tl.constexpr, D: tl.constexpr, N: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, channel = tile * N + tl.arange(0, N).to(tl.int64), tl.arange(0, D)
    real = (token < tokens)[:, None]
    within = head * D + channel[None, :]
    row = batch * heads + head
    place = row * tl.num_programs(0) + tile

    x = tl.load(k + batch * k_batch + token[:, None] * k_token + within, real, 0.0).to(tl.float32)
    codes, scale = _scaled(x, LARGEST)
    at = (batch * padded + token[:, None]) * (heads * D) + within
    tl.store(k_codes + at, codes.to(k_codes.dtype.element_ty))
    tl.store(k_scales + place, scale)

    x = tl.load(v + batch * v_batch + token[:, None] * v_token + within, real, 0.0).to(tl.float32)
    codes, scale = _scaled(x, LARGEST)
    at = (row * D + channel[:, None]) * padded + token[None, :]
    tl.store(v_codes + at, tl.trans(codes.to(v_codes.dtype.element_ty)))
    tl.store(v_scales + place, scale)


@triton.jit
def _round_rows(
    x, codes, scales, rows, tokens, x_batch, x_token,
    heads: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0) * R + tl.arange(0, R).to(tl.int64), tl.arange(0, D)
    real = row < rows
    token, head = row // heads, row % heads
    at = token // tokens * x_batch + token % tokens * x_token + head * D
    values = tl.load(x + at[:, None] + channel[None, :], real[:, None], 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 1) / LARGEST, 1e-30)
    found = (values * (1 / scale)[:, None]).to(codes.dtype.element_ty)
    tl.store(codes + row[:, None] * D + channel[None, :], found, real[:, None])
    tl.store(scales + (token // tokens * heads + head) * tokens + token % tokens, scale, real)


@triton.jit
def _tile(
    codes, keys, values, k_scales, v_scales, v_largest, factor, batch, row, tile, tiles, tokens, peak, total, acc,
    heads: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Takes a tile of keys into the running maximum, the sum of exponentials and the weighted sum of values."""
    k = keys.load([(batch * tiles + tile) * N, row % heads * D])
    s = tl.dot(codes, k.T)
    by = factor * tl.load(k_scales + row * tiles + tile)
    weight = tl.load(v_scales + row * tiles + tile) / v_largest
    if RAGGED:
        s = tl.where((tile * N + tl.arange(0, N) < tokens)[None, :], s, -1e30)
    higher = tl.maximum(peak, tl.max(s, 1) * by)
    # The tile's values are to be multiplied by their scale: its logarithm joins the exponent, and leaves the sum.
    p = tl.math.exp2(s * by[:, None] - (higher - SHIFT - tl.math.log2(weight))[:, None])
    fade = tl.math.exp2(peak - higher)
    total = total * fade + tl.sum(p, 1) / weight
    v = values.load([row * D, tile * N])
    return higher, total, tl.dot(p.to(v.dtype), v.T, acc * fade[:, None])


@triton.jit
def _attend(
    q, keys, values, q_scales, k_scales, v_scales, out, lse, queries, tokens, tiles, part_tiles, scale,
    heads: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
    SHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    query, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    real = (query < queries)[:, None]
    at = (batch * queries + query[:, None]).to(tl.int64) * (heads * D) + head * D + channel[None, :]
    codes = tl.load(q + at, real, 0.0)
    factor = tl.load(q_scales + row.to(tl.int64) * queries + query, query < queries, 1.0) * scale

    every = tl.arange(0, TILES)
    v_largest = tl.max(tl.load(v_scales + row * tiles + every, every < tiles, 0.0), 0)
    peak = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    first = part * part_tiles
    last = tl.minimum(first + part_tiles, tiles)
    full = tl.minimum(last, tokens // N)
    for tile in tl.range(first, full):
        peak, total, acc = _tile(
            codes, keys, values, k_scales, v_scales, v_largest, factor, batch, row, tile, tiles, tokens, peak, total, acc,
            heads, D, N, SHIFT, False,
        )  # fmt: skip
    if RAGGED:  # noqa: SIM102 (known when the kernel is compiled)
        if full < last:
            peak, total, acc = _tile(
                codes, keys, values, k_scales, v_scales, v_largest, factor, batch, row, full, tiles, tokens, peak, total, acc,
                heads, D, N, SHIFT, True,
            )  # fmt: skip
    found = acc * (v_largest / total)[:, None]
    samples = tl.num_programs(1) // heads
    place = ((part * samples + batch) * queries + query[:, None]).to(tl.int64) * (heads * D) + head * D + channel[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), real)
    ends = peak + tl.math.log2(total) - SHIFT
    tl.store(lse + (part * tl.num_programs(1) + row).to(tl.int64) * queries + query, ends, query < queries)


@triton.jit
def _join(outs, lses, joined, rows, queries, heads: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr):
    """Outputs of parts of the keys, weighted by their shares of the sum of exponentials."""
    row, channel = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, D)
    real = row < rows
    token, head = row // heads, row % heads
    ends = (token // queries * heads + head).to(tl.int64) * queries + token % queries
    peak = tl.full([R], -1e30, tl.float32)
    for part in tl.static_range(PARTS):
        peak = tl.maximum(peak, tl.load(lses + part * rows + ends, real, -1e30))
    total, acc = tl.zeros([R], tl.float32), tl.zeros([R, D], tl.float32)
    at = row[:, None].to(tl.int64) * D + channel[None, :]
    for part in tl.static_range(PARTS):
        share = tl.math.exp2(tl.load(lses + part * rows + ends, real, -1e30) - peak)
        size = tl.cast(rows, tl.int64) * D
        acc += share[:, None] * tl.load(outs + part * size + at, real[:, None], 0.0).to(tl.float32)
        total += share
    tl.store(joined + at, (acc / total[:, None]).to(joined.dtype.element_ty), real[:, None])


def parts_of_keys(programs: int, tiles: int, slots: int) -> int:
    """Into how many parts the keys go so that the last wave of programs leaves the least of a GPU idle.

    Example:
        >>> parts_of_keys(888, 256, 264), parts_of_keys(6144, 256, 264), parts_of_keys(10, 2, 264)
        (2, 1, 1)
    """

    def cost(parts: int) -> float:
        waves = math.ceil(programs * parts / slots) / parts
        return waves * (1 + JOINING * (parts > 1))

    return min((parts for parts in range(1, MOST_PARTS + 1) if parts == 1 or tiles >= parts * LEAST_TILES), key=cost)


def rounded_rows(q: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, L, H, D] in fp8, with a scale for each in each head: codes [B, L, H, D], scales [B, H, L] float32."""
    batch, tokens, heads, dim = q.shape
    codes = torch.empty(q.shape, dtype=CODES, device=q.device)
    scales = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    rows = batch * tokens * heads
    _round_rows[(triton.cdiv(rows, ROWS),)](
        q, codes, scales, rows, tokens, q.stride(0), q.stride(1), heads=heads, D=dim, R=ROWS, LARGEST=LARGEST
    )
    return codes, scales


def rounded_tiles(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values in fp8, with a scale for each tile of `KEYS` tokens in each head.

    Args:
        k, v: [B, L, H, D], heads and channels contiguous.

    Returns:
        codes of k: [B, L', H, D], L' the next multiple of `KEYS`, zeros at its end; of v: [B, H, D, L'], as fp8 products need
        them. Scales of k and of v: [B, H, L' / KEYS], float32.
    """
    batch, tokens, heads, dim = k.shape
    tiles = triton.cdiv(tokens, KEYS)
    k_codes = torch.empty(batch, tiles * KEYS, heads, dim, dtype=CODES, device=k.device)
    v_codes = torch.empty(batch, heads, dim, tiles * KEYS, dtype=CODES, device=k.device)
    k_scales, v_scales = (torch.empty(batch, heads, tiles, dtype=torch.float32, device=k.device) for _ in range(2))
    _round[(tiles, heads, batch)](
        k, v, k_codes, v_codes, k_scales, v_scales, tokens, tiles * KEYS, k.stride(0), v.stride(0), k.stride(1), v.stride(1),
        heads=heads, D=dim, N=KEYS, LARGEST=LARGEST, num_warps=ROUND_WARPS,
    )  # fmt: skip
    return k_codes, v_codes, k_scales, v_scales


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q [B, Lq, H, D] over k and v [B, Lk, H, D] with fp8 products: [B, Lq, H, D], q's dtype."""
    q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    codes, q_scales = rounded_rows(q)
    k_codes, v_codes, k_scales, v_scales = rounded_tiles(k, v)
    tokens, tiles = k.shape[1], k_scales.shape[2]
    blocks = triton.cdiv(queries, QUERIES)
    parts = parts_of_keys(blocks * heads * batch, tiles, programs_for(q.device, RESIDENT))
    part_tiles = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, part_tiles)  # none is empty
    outs = torch.empty(parts, batch, queries, heads, dim, dtype=q.dtype, device=q.device)
    lses = torch.empty(parts, batch, heads, queries, dtype=torch.float32, device=q.device)
    keys = TensorDescriptor.from_tensor(k_codes.view(-1, heads * dim), [KEYS, dim])
    values = TensorDescriptor.from_tensor(v_codes.view(-1, tiles * KEYS), [dim, KEYS])
    _attend[(blocks, heads * batch, parts)](
        codes, keys, values, q_scales, k_scales, v_scales, outs, lses, queries, tokens, tiles, part_tiles,
        math.log2(math.e) / math.sqrt(dim), heads=heads, D=dim, M=QUERIES, N=KEYS, TILES=triton.next_power_of_2(tiles),
        SHIFT=SHIFT, RAGGED=bool(tokens % KEYS),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if parts == 1:
        return outs[0]
    joined = torch.empty_like(outs[0])
    rows = batch * queries * heads
    _join[(triton.cdiv(rows, ROWS),)](outs, lses, joined, rows, queries, heads=heads, D=dim, PARTS=parts, R=ROWS)
    return joined
