"""Where a block's own keys and values meet the cached ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sftk.functional.attention import FLASH, Kernel
from sftk.functional.flash import has_flash_4
from sftk.functional.packed import unpack
from sftk.functional.rooms import CachedKV, tensors_of
from sftk.models.rope import rotate

APART_FROM = 32768
"""Cached tokens of a pass above which those with gradient join no copies. Of Wan 1.3B that is the 21 frames of a clip (32760):
up to there, such a pass takes the GPU less time than its host needs to launch it, and a copy of a layer's keys and values is
0.1 GB each; above, copies and gradients weigh more with every frame, and a few launches more in each layer do not count."""


def attends_apart(past: Sequence[Sequence[CachedKV]], backend: Kernel, dtype: torch.dtype) -> bool:
    """Whether blocks of a pass with gradient attend to cached keys and to their own by `attention_apart`.

    They do above `APART_FROM` cached tokens that ask for no gradient and are stored as they are, with FlashAttention 4 on CUDA
    and with PyTorch's on a CPU. On the meta device, `flash` and `flash_split_kv` stand for FlashAttention 4.

    Args:
        past: k, v of each chunk [B, P_i, H, D], of each layer.
        backend: of self-attention, settled, see `sftk.functional.attention.settled`.
        dtype: of the pass's own keys and values.

    Example:
        >>> def cached(tokens):
        ...     return [[(torch.zeros(1, tokens, 1, 1), torch.zeros(1, tokens, 1, 1))]]
        >>> [attends_apart(cached(tokens), "sdpa", torch.float32) for tokens in (APART_FROM, APART_FROM + 1)]
        [False, True]
    """
    chunks = past[0] if past else ()
    keys = [k for k, v in chunks if isinstance(k, Tensor) and isinstance(v, Tensor)]
    if len(keys) < len(chunks) or sum(k.shape[1] for k in keys) <= APART_FROM:
        return False
    device = keys[0].device.type
    if device == "cuda":
        able = backend in FLASH and dtype in (torch.bfloat16, torch.float16) and has_flash_4()
    else:
        able = backend in (FLASH if device == "meta" else ("auto", "sdpa"))
    return able and all(x.dtype == dtype and not x.requires_grad for layer in past for x in tensors_of(tuple(layer)))


def joined(past: tuple[CachedKV, ...], k: Tensor, v: Tensor, past_rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Cached keys and values and those of a pass, as copies.

    Args:
        past: k, v of each chunk, [B, P_i, H, D]. k, v: [B, L, H, D]. past_rope: tables of the cached keys, or None.

    Returns:
        k, v: [B, P + L, H, D] each.

    Example:
        >>> x = torch.zeros(1, 3, 2, 8)
        >>> joined(((x, x), (x, x)), x, x, None)[0].shape
        torch.Size([1, 9, 2, 8])
    """
    if not past:
        return k, v
    past_k = [unpack(chunk[0], k.dtype) for chunk in past]
    if past_rope is not None:
        past_k = [rotate(torch.cat(past_k, dim=1), *past_rope)]
    past_v = (unpack(chunk[1], v.dtype) for chunk in past)
    return torch.cat([*past_k, k], dim=1), torch.cat([*past_v, v], dim=1)


def written(past: tuple[CachedKV, ...], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Cached keys and values with those of a pass written into the space behind them.

    Args:
        past: k, v of one chunk, [B, P + L, H, D], the last L of which are space. k, v: [B, L, H, D].

    Returns:
        k, v: [B, P + L, H, D] each, the chunk itself.

    Example:
        >>> x = torch.zeros(1, 3, 1, 1)
        >>> written(((x, x.clone()),), torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))[0].flatten()
        tensor([0., 1., 1.])
    """
    k_all, v_all = _only(past)
    start = k_all.shape[1] - k.shape[1]
    k_all[:, start:] = k
    v_all[:, start:] = v
    return k_all, v_all


def cached(past: tuple[CachedKV, ...], own: int) -> list[tuple[Tensor, Tensor]]:
    """What is cached before the space for `own` tokens at the end of the only chunk; all chunks where there is none.

    Example:
        >>> x = torch.zeros(1, 5, 1, 1)
        >>> [(k.shape[1], v.shape[1]) for k, v in cached(((x, x),), 2)]
        [(3, 3)]
    """
    if own:
        return [tuple(x[:, : x.shape[1] - own] for x in _only(past))]  # pyright: ignore[reportReturnType]
    assert all(isinstance(x, Tensor) for chunk in past for x in chunk)
    return list(past)  # pyright: ignore[reportReturnType]


def _only(past: tuple[CachedKV, ...]) -> tuple[Tensor, Tensor]:
    ((k, v),) = past
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    return k, v
