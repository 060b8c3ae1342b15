"""The space behind cached keys and values: a pass writes its own there, and its caller may read them or cache them in place."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch import Tensor
from torch.utils import _pytree as pytree

from sftk.functional.rooms import CachedKV, Room

LayerKV = tuple[Tensor, Tensor, Tensor, Tensor]
"""What a layer returns: self-attention k, v [B, L, H, D] and text k, v [B, T, H, D]."""
TextKV = tuple[tuple[Tensor, Tensor], ...]
"""Text (k, v) of each layer, [B, T, H, D]."""


# A dataclass, so that torch.compile can trace its construction, as that of a cache.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FreeSpace:
    """Space in a room for the frames of a pass, behind the cached ones.

    Args:
        room: whose filled frames are the cached ones.
        count: frames of the pass.
        layers: (k, v) of each layer, [B, (filled + count) * tokens, H, D], as views.
    """

    room: Room
    count: int
    layers: tuple[CachedKV, ...]

    def lend(self, text: TextKV) -> LentKV:
        """What a pass wrote, as its keys and values."""
        lent = LentKV(self, text)
        self.room.lent = weakref.ref(lent)
        return lent


class LentKV(Sequence[LayerKV]):
    """Keys and values that lie where a pass wrote them, until somebody reads them or something else is written there.

    They are a value as any other: reading makes a copy, once, and so does the room before it writes there anew. Only `append`
    need not copy: it takes them where they are.
    """

    def __init__(self, space: FreeSpace, text: TextKV):
        self.text = text
        self._space: FreeSpace | None = space
        self._before = space.room.filled
        self._kept: tuple[LayerKV, ...] = ()

    def lies_behind(self, room: Room | None, count: int) -> bool:
        """Whether `count` frames lie uncopied behind what fills a room."""
        lent = None if room is None or room.lent is None else room.lent()
        return lent is self and self._space is not None and count == self._space.count

    def keep(self) -> tuple[LayerKV, ...]:
        """As tensors of their own; the room is no longer held for them."""
        if self._space is not None:
            frames = self._before + self._space.count

            def own(values: Any) -> Tensor:
                return values[:, values.shape[1] // frames * self._before :].clone()

            pairs = zip(self._space.layers, self.text, strict=True)
            self._kept, self._space = tuple((own(k), own(v), *text) for (k, v), text in pairs), None
        return self._kept

    @overload
    def __getitem__(self, index: int) -> LayerKV: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerKV, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerKV | tuple[LayerKV, ...]:
        return self.keep()[index]

    def __len__(self) -> int:
        return len(self.text)

    def __iter__(self) -> Iterator[LayerKV]:
        return iter(self.keep())

    def __reduce__(self) -> tuple[type, tuple[tuple[LayerKV, ...]]]:
        return tuple, (self.keep(),)


pytree.register_pytree_node(LentKV, lambda kv: (list(kv), None), lambda values, _: tuple(values))
