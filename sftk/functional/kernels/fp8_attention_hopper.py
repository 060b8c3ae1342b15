# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""The softmax over tiles of keys with fp8 products on Hopper, its warps specialised.

A program has a multiprocessor to itself. One warp group loads tiles of keys and values into a ring of `STAGES`; two others take
64 queries each. While a group's tensor cores multiply the probabilities of a tile with its values, the group takes the
exponentials of the next one, and the other group fills what gaps are left. Programs persist: tiles of the next queries are on
their way while the last ones are finished.

Source: FlashAttention-3, arXiv 2407.08608, section 3, but for two things. Hopper's tensor cores sum fp8 products with 14 bits,
so that a long sum loses what is small against it: here they sum up one tile at a time, and the threads add up the tiles in
float32. That takes a second set of registers, so probabilities go to the product through shared memory.
"""

from __future__ import annotations

import math

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sftk.functional.fp8_attention import TILE
from sftk.functional.kernels.fp8_attention_tiles import SHIFT
from sftk.functional.kernels.launch import programs_for

QUERIES, GROUPS = 64, 2
"""Queries of a warp group that computes, and such groups of a program."""
STAGES = 3
"""Tiles of keys, and of values, in shared memory."""
REGISTERS = 240
"""Of a thread that computes; three warp groups share 65536, and the one that loads needs few."""

_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name until Triton 3.8


@gluon.jit
def _work(item, blocks, rows, part_tiles, tiles):
    """What an item of a program's work is: queries, sample and head, part of the keys, its first tile and how many."""
    first = item // (blocks * rows) * part_tiles
    return item % blocks, item // blocks % rows, item // (blocks * rows), first, gl.minimum(part_tiles, tiles - first)


@gluon.jit
def _tile_at(i, first, count):
    """The part's last tile comes first, where it may be masked: it may hold fewer keys."""
    return gl.where(i == 0, first + count - 1, first + i - 1)


@gluon.jit
def _load(
    queries_at, keys, values, q_bufs, k_bufs, v_bufs, q_full, q_free, k_full, v_full, free,
    items, blocks, rows, part_tiles, queries, tiles,
    heads: gl.constexpr, D: gl.constexpr, N: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    done = 0  # tiles since the program began
    turn = 0  # items
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, row, _part, first, count = _work(item, blocks, rows, part_tiles, tiles)
        batch, head = row // heads, row % heads
        side = turn % 2
        mbarrier.wait(q_free.index(side), (turn // 2 + 1) & 1)
        mbarrier.expect(q_full.index(side), GROUPS * M * D)
        for group in gl.static_range(GROUPS):
            start = batch * queries + (block * GROUPS + group) * M
            _copy(queries_at, [start, head * D], q_full.index(side), q_bufs.index(side * GROUPS + group))
        for i in range(count):
            tile = _tile_at(i, first, count)
            slot = done % STAGES
            # What the sign of tile n frees is said in `_attend_group`; that of tile `done - STAGES + 1` has been waited for.
            mbarrier.expect(k_full.index(slot), N * D)
            _copy(keys, [(batch * tiles + tile) * N, head * D], k_full.index(slot), k_bufs.index(slot))
            freed = done + 2 - STAGES
            mbarrier.wait(free.index((done + 2) % STAGES), (freed // STAGES) & 1, pred=freed >= 0)
            mbarrier.expect(v_full.index(slot), N * D)
            _copy(values, [row * D, tile * N], v_full.index(slot), v_bufs.index(slot))
            done += 1
        turn += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit
def _softmax(s, by, v_scale, peak, total, M: gl.constexpr, N: gl.constexpr, SHIFT: gl.constexpr):
    """Probabilities of a tile's scores, how much earlier ones fade, and the running maximum and sums.

    The tile's values are to be multiplied by their scale: its logarithm joins the exponent, and leaves the sums. Each of the
    four threads that share a query has a sum of its own until the end.
    """
    raised = gl.log2(v_scale)
    higher = gl.maximum(peak, gl.max(s, 1) * by + raised)
    p = gl.exp2(gl.fma(s, by[:, None], (SHIFT + raised - higher)[:, None]))
    fade = gl.exp2(peak - higher)
    some = gl.sum(gl.sum(p.reshape([M, N // 8, 4, 2]), 3), 1)
    total = total * gl.convert_layout(fade, gl.SliceLayout(1, some.type.layout))[:, None] + some / v_scale
    return p, fade, higher, total


@gluon.jit
def _codes(p, layout: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """Probabilities in fp8, in the order of `fp8_codes.in_order`: no value leaves its thread."""
    ordered = p.reshape([M, N // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([M, N])
    codes = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [gl.convert_layout(ordered, layout, assert_trivial=True)],
        gl.int8,
        is_pure=True,
        pack=4,
    )
    return codes.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _attend_group(
    group: gl.constexpr, p_bufs, q_bufs, k_bufs, v_bufs, q_full, q_free, k_full, v_full, free,
    q_scales, k_scales, v_scales, out, lse, items, blocks, rows, part_tiles, queries, tokens, tiles, scale,
    heads: gl.constexpr, D: gl.constexpr, N: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    SHIFT: gl.constexpr,
):  # fmt: skip
    """A warp group's part of each item.

    The sign of tile n, in `free`, says that the keys of tile n and the values of tile n - 2 have been read. Products without
    a sum to add to take zeros, which cost nothing.
    """
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    row_scores: gl.constexpr = gl.SliceLayout(1, of_scores)
    row_out: gl.constexpr = gl.SliceLayout(1, of_out)
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, of_out, 4)
    no_scores = gl.zeros([M, N], gl.float32, of_scores)
    no_out = gl.zeros([M, D], gl.float32, of_out)
    partial: gl.constexpr = gl.sum(gl.sum(no_scores.reshape([M, N // 8, 4, 2]), 3), 1).type.layout
    done = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, row, part, first, count = _work(item, blocks, rows, part_tiles, tiles)
        batch, head = row // heads, row % heads
        side = turn % 2
        begin = (block * GROUPS + group) * M
        query = begin + gl.arange(0, M, row_scores)
        factor = gl.load(q_scales + row.to(gl.int64) * queries + query, query < queries, 1.0) * scale
        tile = _tile_at(0, first, count)
        k_scale = gl.load(k_scales + row * tiles + tile)
        v_scale = gl.load(v_scales + row * tiles + tile)
        q = q_bufs.index(side * GROUPS + group)

        mbarrier.wait(q_full.index(side), (turn // 2) & 1)
        slot = done % STAGES
        mbarrier.wait(k_full.index(slot), (done // STAGES) & 1)
        s = warpgroup_mma(q, k_bufs.index(slot).permute([1, 0]), no_scores, use_acc=False)
        mbarrier.arrive(free.index(slot))
        key = tile * N + gl.arange(0, N, gl.SliceLayout(0, of_scores))
        s = gl.where((key < tokens)[None, :], s, -1e30)
        peak = gl.full([M], -1e30, gl.float32, row_scores)
        total = gl.zeros([M, 4], gl.float32, partial)
        fade = gl.zeros([M], gl.float32, row_scores)
        acc = no_out
        weighted = warpgroup_mma_init(no_out)
        for i in range(1, count):
            slot = done % STAGES
            ahead = (done + 1) % STAGES
            faded = gl.convert_layout(fade, row_out)  # what the tile before this one left of the earlier ones
            p, fade, peak, total = _softmax(s, factor * k_scale, v_scale, peak, total, M, N, SHIFT)
            tile = _tile_at(i, first, count)
            k_scale = gl.load(k_scales + row * tiles + tile)
            v_scale = gl.load(v_scales + row * tiles + tile)
            p_buf = p_bufs.index(group * 2 + done % 2)
            p_buf.store(_codes(p, factor_layout, M, N))
            fence_async_shared()
            mbarrier.wait(k_full.index(ahead), ((done + 1) // STAGES) & 1)
            mbarrier.wait(v_full.index(slot), (done // STAGES) & 1)
            ready = warpgroup_mma_wait(0, deps=(weighted,))
            s = warpgroup_mma(q, k_bufs.index(ahead).permute([1, 0]), no_scores, use_acc=False, is_async=True)
            acc = gl.fma(acc, faded[:, None], ready)
            weighted = warpgroup_mma(p_buf, v_bufs.index(slot).permute([1, 0]), no_out, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(free.index(ahead))
            done += 1
        mbarrier.arrive(q_free.index(side))

        slot = done % STAGES
        faded = gl.convert_layout(fade, row_out)
        p, fade, peak, total = _softmax(s, factor * k_scale, v_scale, peak, total, M, N, SHIFT)
        p_buf = p_bufs.index(group * 2 + done % 2)
        p_buf.store(_codes(p, factor_layout, M, N))
        fence_async_shared()
        acc = gl.fma(acc, faded[:, None], warpgroup_mma_wait(0, deps=(weighted,)))
        mbarrier.wait(v_full.index(slot), (done // STAGES) & 1)
        last = warpgroup_mma(p_buf, v_bufs.index(slot).permute([1, 0]), no_out, use_acc=False)
        acc = gl.fma(acc, gl.convert_layout(fade, row_out)[:, None], last)
        done += 1
        turn += 1  # noqa: SIM113 (a kernel has no enumerate)

        sums = gl.convert_layout(gl.sum(total, 1), row_scores)
        found = acc * gl.convert_layout(1 / sums, row_out)[:, None]
        at = begin + gl.arange(0, M, row_out)
        channel = head * D + gl.arange(0, D, gl.SliceLayout(0, of_out))
        place = ((part * (rows // heads) + batch) * queries + at).to(gl.int64) * (heads * D)
        gl.store(out + place[:, None] + channel[None, :], found.to(out.dtype.element_ty), (at < queries)[:, None])
        ends = peak + gl.log2(sums) - SHIFT
        gl.store(lse + (part * rows + row).to(gl.int64) * queries + query, ends, query < queries)


@gluon.jit
def _attend(
    queries_at, keys, values, q_scales, k_scales, v_scales, out, lse,
    items, blocks, rows, part_tiles, queries, tokens, tiles, scale,
    heads: gl.constexpr, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    SHIFT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, N], gl.float8e4nv)
    signs: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(gl.float8e4nv, [2 * GROUPS, M, D], queries_at.layout)
    k_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, N, D], keys.layout)
    v_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, N], values.layout)
    p_bufs = gl.allocate_shared_memory(gl.float8e4nv, [2 * GROUPS, M, N], p_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], signs)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], signs)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signs)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signs)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signs)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_load, (
                queries_at, keys, values, q_bufs, k_bufs, v_bufs, q_full, q_free, k_full, v_full, free,
                items, blocks, rows, part_tiles, queries, tiles, heads, D, N, M, STAGES, GROUPS,
            )),
            (_attend_group, (
                first, p_bufs, q_bufs, k_bufs, v_bufs, q_full, q_free, k_full, v_full, free,
                q_scales, k_scales, v_scales, out, lse, items, blocks, rows, part_tiles, queries, tokens, tiles, scale,
                heads, D, N, M, STAGES, GROUPS, SHIFT,
            )),
            (_attend_group, (
                second, p_bufs, q_bufs, k_bufs, v_bufs, q_full, q_free, k_full, v_full, free,
                q_scales, k_scales, v_scales, out, lse, items, blocks, rows, part_tiles, queries, tokens, tiles, scale,
                heads, D, N, M, STAGES, GROUPS, SHIFT,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


def run(
    codes: Tensor, q_scales: Tensor, k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor,
    outs: Tensor, lses: Tensor, tokens: int, part_tiles: int,
) -> None:  # fmt: skip
    """Attends, see `fp8_attention.Form`."""
    parts, batch, queries, heads, dim = outs.shape
    tiles = k_scales.shape[2]
    blocks, rows = triton.cdiv(queries, QUERIES * GROUPS), batch * heads
    items = blocks * rows * parts
    _attend[(min(items, programs_for(outs.device, 1)),)](
        _tiled(codes.view(-1, heads * dim), [QUERIES, dim]),
        _tiled(k_codes.view(-1, heads * dim), [TILE, dim]),
        _tiled(v_codes.view(-1, tiles * TILE), [dim, TILE]),
        q_scales, k_scales, v_scales, outs, lses, items, blocks, rows, part_tiles, queries, tokens, tiles,
        math.log2(math.e) / math.sqrt(dim),
        heads=heads, D=dim, M=QUERIES, N=TILE, STAGES=STAGES, GROUPS=GROUPS, SHIFT=SHIFT, REGISTERS=REGISTERS, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def _tiled(codes: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(codes, block, gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv))
