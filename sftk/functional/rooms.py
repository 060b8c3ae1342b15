"""Memory for cached keys and values: room for more frames than are cached, in which a cache grows without copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sftk.functional.packed import Packed

CachedKV = tuple[Tensor | Packed, Tensor | Packed]
"""Cached k, v of one layer: [B, L, H, D] tensors, or packed ones."""


@dataclasses.dataclass(eq=False)
class Room:
    """Memory for the keys and values of more frames than a chunk has; chunks that grow in it share it.

    Args:
        layers: (k, v) of each layer, [B, frames * tokens, H, D].
        frames: how many there is room for. filled: how many of them a chunk holds.
        lent: what lies behind the filled frames and may be read, if it is still held.
    """

    layers: tuple[CachedKV, ...]
    frames: int
    filled: int = 0
    lent: Callable[[], Any] | None = None

    def takes(self, layers: tuple[CachedKV, ...], count: int) -> bool:
        """Whether `count` frames of such keys and values can be written here as they are."""
        bases, tensors = tensors_of(self.layers), tensors_of(layers)
        return len(bases) == len(tensors) and all(
            (base.shape[0], base.shape[2:], base.dtype, base.device, base.shape[1] * count)
            == (tensor.shape[0], tensor.shape[2:], tensor.dtype, tensor.device, tensor.shape[1] * self.frames)
            for base, tensor in zip(bases, tensors, strict=True)
        )

    def write(self, layers: tuple[CachedKV, ...], count: int) -> tuple[CachedKV, ...]:
        """Writes `count` frames behind those that fill the room, and returns what fills it now, as views."""
        self.settle()
        for base, tensor in zip(tensors_of(self.layers), tensors_of(layers), strict=True):
            start = self.filled * (base.shape[1] // self.frames)
            # Not an in-place change for autograd: what was remembered lies before it, and nothing there changes.
            base.data[:, start : start + tensor.shape[1]].copy_(tensor)
        return self.extend(count)

    def extend(self, count: int) -> tuple[CachedKV, ...]:
        """Takes the `count` frames that lie behind for filled, and returns what fills the room now, as views."""
        self.filled, self.lent = self.filled + count, None
        return self._first(self.layers, self.filled)

    def beyond(self, count: int) -> tuple[CachedKV, ...]:
        """What fills the room and `count` frames behind it, as views; writing there is no change for autograd."""
        self.settle()
        return self._first(each_of(self.layers, lambda base: base.data), self.filled + count)

    def settle(self) -> None:
        """Before something is written behind what is filled: whoever still has what was lent there gets a copy of it."""
        lent, self.lent = self.lent and self.lent(), None
        if lent is not None:
            lent.keep()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lent": None}  # a copy of a room has lent nothing

    def _first(self, layers: tuple[CachedKV, ...], frames: int) -> tuple[CachedKV, ...]:
        return each_of(layers, lambda base: base[:, : base.shape[1] // self.frames * frames])


_memory: Callable[[], AbstractContextManager[object]] = nullcontext


def set_room_memory(memory: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
    """Sets in what context rooms are allocated, such as a memory pool's that gives them the same addresses again.

    Example:
        >>> set_room_memory()
    """
    global _memory
    _memory = memory


def make_room(layers: tuple[CachedKV, ...], count: int, frames: int) -> Room:
    """Room for `frames` frames of such keys and values as `layers` has for `count` of them.

    Example:
        >>> import torch
        >>> make_room(((torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8)),), 3, 12).layers[0][1].shape
        torch.Size([1, 24, 2, 8])
    """
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    # Rooms that sampling in inference mode makes can be written to outside of it, too.
    with torch.inference_mode(False), _memory():
        for tensor in tensors_of(layers):
            batch, tokens, *rest = tensor.shape
            made = alike.setdefault(_kind(tensor), [])
            made.append(tensor.new_empty(batch, tokens // count * frames, *rest))
    for made in alike.values():
        if made[0].is_cuda:  # memory that was freed comes back by address: so each layer gets its own again
            made.sort(key=Tensor.data_ptr)
    fresh = {kind: iter(made) for kind, made in alike.items()}
    return Room(each_of(layers, lambda tensor: next(fresh[_kind(tensor)])), frames)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def tensors_of(layers: tuple[CachedKV, ...]) -> list[Tensor]:
    """All tensors of the layers, in order.

    Example:
        >>> import torch
        >>> len(tensors_of(((torch.zeros(1, 6, 2, 8), Packed(torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 1))),)))
        3
    """
    found: list[Tensor] = []
    for values in (values for layer in layers for values in layer):
        parts = (values,) if isinstance(values, Tensor) else values
        found += [part for part in parts if part is not None]
    return found


def each_of(layers: tuple[CachedKV, ...], change: Callable[[Tensor], Tensor]) -> tuple[CachedKV, ...]:
    """Layers with every tensor changed, in the order of `tensors_of`; axes of codes and scales are the same but for the last.

    Example:
        >>> import torch
        >>> each_of(((torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8)),), lambda x: x[:, :2])[0][0].shape
        torch.Size([1, 2, 2, 8])
    """

    def changed(values: Tensor | Packed) -> Tensor | Packed:
        if isinstance(values, Tensor):
            return change(values)
        codes, scale = change(values.codes), change(values.scale)
        return Packed(codes, scale, None if values.path is None else change(values.path))

    return tuple((changed(k), changed(v)) for k, v in layers)
