"""The blocks of a backbone one after the other, and what a pass gives to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor, nn

from sftk.functional.attention import Backend, Kernel, Mask
from sftk.functional.cache import LayerKV
from sftk.functional.exchange import Exchange
from sftk.functional.rooms import CachedKV
from sftk.models.block_ops import BlockOps
from sftk.models.compiled import any_length, is_compiled


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BlockCall:
    """What all blocks of a pass are given, besides the hidden states.

    Args:
        time: [B, F, 6, width], per frame.
        rope: tables of all tokens. past_rope: tables of the cached keys when they are stored unrotated, else None.
        text: [B, T, width], or None when `text_kv` has k, v of each layer.
        past: cached k, v of each layer, [B, P_i, H, D] of each chunk; of all tokens, and this rank's heads.
        joint: the only chunk goes on behind the cached tokens, with space for this pass's own, which blocks write there.
        apart: attend to what is cached and to the pass's own keys without joining them, see `attends_apart`.
        mask: who sees whom.
        backend, text_backend: of self-attention and of cross-attention.
        keep_kv: return keys and values.
        exchange: gives self-attention all tokens where several ranks share them.
        ops: what lies between the products.
    """

    time: Tensor
    rope: tuple[Tensor, Tensor]
    past_rope: tuple[Tensor, Tensor] | None
    text: Tensor | None
    text_kv: tuple[tuple[Tensor, Tensor], ...] | None
    past: tuple[tuple[CachedKV, ...], ...]
    joint: bool
    apart: bool
    mask: Mask
    backend: Kernel
    text_backend: Backend
    keep_kv: bool
    exchange: Exchange
    ops: BlockOps


Passed = tuple[Tensor, tuple[LayerKV, ...], dict[int, Tensor]]
"""Hidden states after the last block, keys and values of each, hidden states after those that were asked for."""


class Trunk(Protocol):
    """What takes hidden states through the blocks: `run_blocks`, or what replays its kernels."""

    def __call__(self, blocks: nn.ModuleList, x: Tensor, call: BlockCall, wanted: Collection[int] = ()) -> Passed: ...


def run_blocks(blocks: nn.ModuleList, x: Tensor, call: BlockCall, wanted: Collection[int] = ()) -> Passed:
    """Takes hidden states through all blocks.

    Args:
        blocks: `Block`s, wrapped or not.
        x: [B, L, width], the tokens of this rank.
        wanted: indices of blocks after which to return the hidden states.

    Returns:
        See `Passed`; no keys and values without `keep_kv`.
    """
    kv: list[Any] = []
    features: dict[int, Tensor] = {}
    for index, block in enumerate(blocks):
        past = call.past[index] if call.past else ()
        if is_compiled(block):
            any_length(past)
        text_kv = None if call.text_kv is None else call.text_kv[index]
        x, found = block(
            x,
            call.time,
            call.rope,
            call.text,
            text_kv,
            past,
            call.past_rope,
            call.joint,
            call.apart,
            call.mask,
            call.backend,
            call.text_backend,
            call.keep_kv,
            call.exchange,
            call.ops,
        )
        if found is not None:
            kv.append(found)
        if index in wanted:
            features[index] = x
    return x, tuple(kv), features
