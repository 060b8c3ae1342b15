# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""What attention with fp8 products reads: codes of queries, keys and values, and their scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftk.functional.fp8_attention import TILE

ROWS = 32
"""Rows, a token's head each, of a program that rounds queries."""
WARPS = 8
"""Of a program that rounds a tile of keys and of values."""
CODES, LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max


@triton.jit
def _scaled(x, LARGEST: tl.constexpr):
    """A tile's values up to the largest code, and their scale."""
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / LARGEST, 1e-30)
    return x * (1 / scale), scale


@triton.jit
def in_order(place):
    """Which token of its tile a column of the values' codes holds.

    A thread finds in its registers the scores of columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of each 16, q its place among four.
    As a factor of the next product it has to hold four neighbours. Sums do not mind the order of keys, so values are stored in
    the order in which probabilities lie already: column 4 q + 2 b + i holds token 8 b + 2 q + i.
    """
    q, b, i = place % 16 // 4, place % 4 // 2, place % 2
    return place // 16 * 16 + 8 * b + 2 * q + i


@triton.jit
def _round_tiles(
    k, v, k_codes, v_codes, k_scales, v_scales, tokens, padded, k_batch, v_batch, k_token, v_token,
    heads: tl.constexpr, D: tl.constexpr, N: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place, channel = tl.arange(0, N), tl.arange(0, D)
    token = tile * N + place.to(tl.int64)
    within = head * D + channel[None, :]
    row = batch * heads + head
    scale_at = row * tl.num_programs(0) + tile

    x = tl.load(k + batch * k_batch + token[:, None] * k_token + within, (token < tokens)[:, None], 0.0).to(tl.float32)
    codes, scale = _scaled(x, LARGEST)
    at = (batch * padded + token[:, None]) * (heads * D) + within
    tl.store(k_codes + at, codes.to(k_codes.dtype.element_ty))
    tl.store(k_scales + scale_at, scale)

    held = tile * N + in_order(place).to(tl.int64)
    x = tl.load(v + batch * v_batch + held[:, None] * v_token + within, (held < tokens)[:, None], 0.0).to(tl.float32)
    codes, scale = _scaled(x, LARGEST)
    at = (row * D + channel[:, None]) * padded + token[None, :]
    tl.store(v_codes + at, tl.trans(codes.to(v_codes.dtype.element_ty)))
    tl.store(v_scales + scale_at, scale)


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
    """Keys and values in fp8, with a scale for each tile of `TILE` tokens in each head.

    Args:
        k, v: [B, L, H, D], heads and channels contiguous.

    Returns:
        codes of k: [B, L', H, D], L' the next multiple of `TILE`, zeros at its end; of v: [B, H, D, L'], as fp8 products need
        them, each tile's tokens `in_order`. Scales of k and of v: [B, H, L' / TILE], float32.
    """
    batch, tokens, heads, dim = k.shape
    tiles = triton.cdiv(tokens, TILE)
    k_codes = torch.empty(batch, tiles * TILE, heads, dim, dtype=CODES, device=k.device)
    v_codes = torch.empty(batch, heads, dim, tiles * TILE, dtype=CODES, device=k.device)
    k_scales, v_scales = (torch.empty(batch, heads, tiles, dtype=torch.float32, device=k.device) for _ in range(2))
    _round_tiles[(tiles, heads, batch)](
        k, v, k_codes, v_codes, k_scales, v_scales, tokens, tiles * TILE, k.stride(0), v.stride(0), k.stride(1), v.stride(1),
        heads=heads, D=dim, N=TILE, LARGEST=LARGEST, num_warps=WARPS,
    )  # fmt: skip
    return k_codes, v_codes, k_scales, v_scales
