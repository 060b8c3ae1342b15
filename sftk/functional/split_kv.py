"""Split-KV attention: queries attend to parts of the keys side by side, and what they found is joined."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sftk.core.numerics import rounds_as_with_gradient
from sftk.errors import SpecError
from sftk.functional.flash import flash, has_flash_4

PARTS = 2
"""Parts of the keys. Each further one costs another partial output, and fills a GPU less often any better than two."""


def merge_partials(outs: Tensor, lses: Tensor) -> Tensor:
    """Attention over all keys from that over disjoint parts of them, in float32 (or float64).

    A part weighs what its keys hold of the sum of exponentials: `out = sum_i softmax_i(lse)_i out_i`.

    Args:
        outs: [N, B, Lq, H, D], attention over the keys of each part.
        lses: [N, B, H, Lq], log-sum-exp of each part's scores; -inf of a part without keys.

    Returns:
        [B, Lq, H, D], the dtype of `outs`.

    Source: Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023); FlashAttention, arXiv 2205.14135, section 3.1.

    Example:
        >>> def attend(q, k, v):
        ...     scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
        ...     return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)
        >>> q, k, v = torch.randn(3, 1, 6, 2, 4)
        >>> outs, lses = zip(attend(q, k[:, :2], v[:, :2]), attend(q, k[:, 2:], v[:, 2:]))
        >>> torch.allclose(merge_partials(torch.stack(outs), torch.stack(lses)), attend(q, k, v)[0], atol=1e-6)
        True
    """
    weights = lses.softmax(dim=0).transpose(2, 3)[..., None]
    wide = torch.promote_types(outs.dtype, torch.float32)
    return (weights * outs.to(wide)).sum(dim=0).to(outs.dtype)


@torch.library.custom_op("sftk::flash_split_kv", mutates_args=(), device_types="cuda")
def flash_partials(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention 4 over each of the `PARTS` of a sample's keys, in one call; without gradient.

    The parts are views of k and v, also where these are slices of a longer buffer. An operator of its own, so that no compiled
    graph asks whether the parts divide the number of keys: where they do not, the first part has all of them.

    Args:
        q: [1, Lq, H, D] bf16 or fp16 on CUDA; k, v: [1, Lk, H, D].

    Returns:
        outs: [PARTS, 1, Lq, H, D]; lses: [PARTS, 1, H, Lq] float32. For `merge_partials`.

    Example:
        >>> flash_partials._opoverload.name()
        'sftk::flash_split_kv'
    """
    if k.shape[1] % PARTS:
        out, lse = flash(q, k, v)
        outs, lses = out.new_zeros((PARTS, *out.shape)), lse.new_full((PARTS, *lse.shape), -torch.inf)
        outs[0], lses[0] = out, lse
        return outs, lses
    parts = (x[0].unflatten(0, (PARTS, -1)) for x in (k, v))
    out, lse = flash(q.expand(PARTS, -1, -1, -1), *parts)
    return out[:, None], lse[:, None]


@flash_partials.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty((PARTS, *q.shape)), q.new_empty((PARTS, batch, heads, queries), dtype=torch.float32)


def split_kv_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 4 over parts of a sample's keys; with gradient, or for several samples, over all of them at once.

    Each multiprocessor of a GPU computes a tile, some queries of a head, at a time. A few queries are few tiles, and the last
    wave of them leaves part of the GPU idle: 4680 queries of 12 heads in tiles of 128 are 444 tiles, 3.4 waves on the 132
    multiprocessors of an H100, and take 4. Over both halves of the keys they are 6.7 waves of half the length, and take 7.

    Args:
        q: [B, Lq, H, D] bf16 or fp16 on CUDA; k, v: [B, Lk, H, D].

    Returns:
        [B, Lq, H, D], q's dtype.

    Source: split-KV as in Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023).

    Raises:
        SpecError: FlashAttention 4 is not installed.

    Example:
        >>> if not has_flash_4():
        ...     try:
        ...         split_kv_attention(*torch.zeros(3, 1, 2, 1, 8))
        ...     except SpecError as error:
        ...         print(str(error).partition(";")[0])
        the attention backend 'flash_split_kv' needs FlashAttention 4: pip install 'sftk[flash]'
    """
    if not has_flash_4():
        raise SpecError(
            "the attention backend 'flash_split_kv' needs FlashAttention 4: pip install 'sftk[flash]'; or use 'sdpa'"
        )
    if rounds_as_with_gradient() or q.shape[0] != 1:
        return flash(q, k, v)[0]
    outs, lses = flash_partials(q, k, v)
    if outs.is_cuda and not torch.compiler.is_compiling():
        return _one_kernel()(outs, lses)
    return merge_partials(outs, lses)


@functools.lru_cache(maxsize=1)
def _one_kernel() -> Callable[[Tensor, Tensor], Tensor]:
    """`merge_partials` outside of compiled functions: operator by operator it would take what the parts have gained."""
    return torch.compile(merge_partials)
