# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""Attention with fp8 products: rounding, one of two kernels over tiles of keys, and the joining of parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from sftk.functional.kernels import fp8_attention_tiles
from sftk.functional.kernels.fp8_codes import ROWS, rounded_rows, rounded_tiles
from sftk.functional.kernels.launch import programs_for

MOST_PARTS = 4
"""Parts of the keys at most: each writes an output of its own."""
LEAST_TILES = 8
"""Tiles of keys in a part at least."""
JOINING = 0.02
"""What joining parts costs, of attention's time."""


@attrs.frozen(kw_only=True)
class Form:
    """A kernel that attends.

    Args:
        run: takes codes and scales as `rounded_rows` and `rounded_tiles` return them, then `outs` [parts, B, Lq, H, D], `lses`
            [parts, B, H, Lq] (float32, to the base 2), the number of keys and of tiles in a part. It writes outs and lses.
        queries: of a program. resident: programs on a multiprocessor.
    """

    run: Callable[..., None]
    queries: int
    resident: int


TILES = Form(run=fp8_attention_tiles.run, queries=fp8_attention_tiles.QUERIES, resident=fp8_attention_tiles.RESIDENT)


@functools.lru_cache(maxsize=8)
def form_for(device: torch.device, dim: int) -> Form:
    """The kernel for a device and the channels of a head: that for Hopper where it can run, else the portable one."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and dim in (64, 128):
        try:
            from sftk.functional.kernels import fp8_attention_hopper as hopper
        except ImportError:  # Gluon is young: a version of Triton may lack what the kernel is written in
            return TILES
        return Form(run=hopper.run, queries=hopper.QUERIES * hopper.GROUPS, resident=1)
    return TILES


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


def attend(q: Tensor, k: Tensor, v: Tensor, *, form: Form | None = None) -> Tensor:
    """Softmax attention of q [B, Lq, H, D] over k and v [B, Lk, H, D] with fp8 products: [B, Lq, H, D], q's dtype."""
    return _attended(q, k, v, form)[0]


def attend_lse(q: Tensor, k: Tensor, v: Tensor, *, form: Form | None = None) -> tuple[Tensor, Tensor]:
    """What `attend` returns, and the log-sum-exp of the scores, [B, H, Lq] float32."""
    out, lses = _attended(q, k, v, form)
    return out, torch.logsumexp(lses * math.log(2), dim=0)


def _attended(q: Tensor, k: Tensor, v: Tensor, form: Form | None) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exps of each part of the keys, to the base 2."""
    form = form or form_for(q.device, q.shape[3])
    q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    rounded = (*rounded_rows(q), *rounded_tiles(k, v))
    tiles = rounded[-1].shape[2]
    programs = triton.cdiv(queries, form.queries) * heads * batch
    parts = parts_of_keys(programs, tiles, programs_for(q.device, form.resident))
    part_tiles = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, part_tiles)  # none is empty
    outs = torch.empty(parts, batch, queries, heads, dim, dtype=q.dtype, device=q.device)
    lses = torch.empty(parts, batch, heads, queries, dtype=torch.float32, device=q.device)
    form.run(*rounded, outs, lses, k.shape[1], part_tiles)
    if parts == 1:
        return outs[0], lses
    joined = torch.empty_like(outs[0])
    rows = batch * queries * heads
    _join[(triton.cdiv(rows, ROWS),)](outs, lses, joined, rows, queries, heads=heads, D=dim, PARTS=parts, R=ROWS)
    return joined, lses
