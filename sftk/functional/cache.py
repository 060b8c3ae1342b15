"""Key/value caches as values: appending and windowing return new caches and change no old one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sftk.errors import ShapeError
from sftk.functional.free_space import FreeSpace, LayerKV, LentKV
from sftk.functional.packed import Packed, Storage, pack, unpack
from sftk.functional.rooms import CachedKV, Room, each_of, make_room, tensors_of

RopeMode = Literal["absolute", "relative"]


# Dataclasses, not attrs: torch.compile can trace the construction of a frozen dataclass but not that of a frozen attrs class.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Keys and values of consecutive frames, of all layers.

    Args:
        layers: (k, v) of each layer, [B, frames * tokens, H, D], packed where the cache says so.
        positions: absolute index of each frame.
        room: the memory that the layers are views of, where more fits into it.
    """

    layers: tuple[CachedKV, ...]
    positions: tuple[int, ...]
    room: Room | None = None

    def take(self, start: int, stop: int) -> Chunk:
        """The frames from `start` up to `stop`, as views."""
        if (start, stop) == (0, len(self.positions)):
            return self
        tokens = _codes(self.layers[0][0]).shape[1] // len(self.positions) if self.layers else 0
        cut = slice(start * tokens, stop * tokens)
        return Chunk(layers=each_of(self.layers, lambda tensor: tensor[:, cut]), positions=self.positions[start:stop])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KVCache:
    """Keys and values of the frames so far. Immutable: chunks are shared between a cache and those made from it.

    Args:
        chunks: oldest first.
        text: text (k, v) of each layer, from the first pass that was appended. Passes without gradient take them and do not
            look at their own prompt; see `forget_text` for a prompt that changes.
        rope: `absolute` keys are stored rotated to their frame's index; `relative` ones are stored unrotated and rotated when
            they are read, to their place in the cache, so that a long rollout stays in the trained range.
        storage: how appended keys and values are kept; `fp8` and `int8` take a byte for each, see `pack`. Text stays as it is.
        reserve: frames for which the first one that is appended makes room. As long as they carry no gradient, later ones are
            written behind it, and all are one chunk: nothing has to be joined, and whoever remembers a shorter cache
            shares its memory.

    Example:
        >>> kv = ((torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)),)
        >>> cache = append(append(KVCache(), kv, (0, 1, 2)), kv, (3, 4, 5))
        >>> window(cache, size=4, sink=1).positions
        (0, 3, 4, 5)
    """

    chunks: tuple[Chunk, ...] = ()
    text: tuple[tuple[Tensor, Tensor], ...] | None = None
    rope: RopeMode = "absolute"
    storage: Storage = "full"
    reserve: int = 0

    @property
    def positions(self) -> tuple[int, ...]:
        """Absolute index of each cached frame, in the order in which attention sees them."""
        return tuple(p for chunk in self.chunks for p in chunk.positions)

    @property
    def frames(self) -> int:
        """How many frames are cached."""
        return sum(len(chunk.positions) for chunk in self.chunks)

    def parts(self, index: int) -> tuple[CachedKV, ...]:
        """(k, v) of one layer in each chunk. Joining and unpacking copy, so a model does it where copies are soon dropped."""
        return tuple(chunk.layers[index] for chunk in self.chunks)

    def layer(self, index: int) -> tuple[Tensor, Tensor] | None:
        """(k, v) of one layer over all cached frames, or None when the cache is empty."""
        parts = [(unpack(k), unpack(v)) for k, v in self.parts(index)]
        if len(parts) < 2:
            return parts[0] if parts else None
        k, v = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        return k, v


def append(cache: KVCache, kv: Sequence[LayerKV], positions: tuple[int, ...]) -> KVCache:
    """The cache with the keys and values of further frames at its end.

    Args:
        cache: is not changed.
        kv: what a model returned for these frames. What it wrote behind this cache (`LentKV`) is taken where it is.
        positions: absolute index of each frame.

    Raises:
        ShapeError: the tokens do not divide into the frames.

    Example: see `KVCache`.
    """
    last = cache.chunks[-1] if cache.chunks else None
    room, count = None if last is None else last.room, len(positions)
    lent = kv if isinstance(kv, LentKV) and kv.lies_behind(room, count) else None
    if lent is not None and last is not None and room is not None and _fits(last, room, count):
        chunk = Chunk(layers=room.extend(count), positions=(*last.positions, *positions), room=room)
        text = lent.text if cache.text is None else cache.text
        return dataclasses.replace(cache, chunks=(*cache.chunks[:-1], chunk), text=text)
    for k, *_ in kv[:1]:
        if not positions or k.shape[1] % len(positions):
            raise ShapeError(f"{k.shape[1]} tokens do not divide into {len(positions)} frames")
    storage = cache.storage
    if storage == "full":
        layers: tuple[CachedKV, ...] = tuple((layer[0], layer[1]) for layer in kv)
    else:
        layers = tuple((pack(layer[0], storage), pack(layer[1], storage)) for layer in kv)
    chunk = Chunk(layers=layers, positions=tuple(positions))
    text = cache.text
    if text is None:
        text = tuple((layer[2].detach(), layer[3].detach()) for layer in kv)
    return dataclasses.replace(cache, chunks=_with(cache, chunk), text=text)


def _with(cache: KVCache, chunk: Chunk) -> tuple[Chunk, ...]:
    """The chunks of a cache and a further one, written behind the last one where there is room."""
    count, last = len(chunk.positions), cache.chunks[-1] if cache.chunks else None
    if any(tensor.requires_grad for tensor in tensors_of(chunk.layers)):
        return (*cache.chunks, chunk)
    if last is None and cache.reserve > count:
        room = make_room(chunk.layers, count, cache.reserve)
        return (Chunk(layers=room.write(chunk.layers, count), positions=chunk.positions, room=room),)
    room = None if last is None else last.room
    if last is None or room is None or not (_fits(last, room, count) and room.takes(chunk.layers, count)):
        return (*cache.chunks, chunk)
    positions = (*last.positions, *chunk.positions)
    return (*cache.chunks[:-1], Chunk(layers=room.write(chunk.layers, count), positions=positions, room=room))


def _fits(chunk: Chunk, room: Room, count: int) -> bool:
    """Whether frames can be written behind a chunk: a room that has gone on from it belongs to another cache already."""
    return room.filled == len(chunk.positions) and room.filled + count <= room.frames


def free_space(cache: KVCache, count: int, *, batch: int, tokens: int, dtype: torch.dtype) -> FreeSpace | None:
    """Where a pass over `count` frames may write its keys and values, so that it attends to them and to the context as one.

    Nobody reads there but who wrote. So a pass without gradient joins no copies.

    Args:
        cache: all in one room, in full, with text.
        batch, tokens, dtype: samples, tokens of a frame and dtype of the pass's keys and values.

    Returns:
        None where there is no such space, or what is cached is of another kind.

    Example:
        >>> kv = ((torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)),)
        >>> cache = append(KVCache(reserve=6), kv, (0, 1, 2))
        >>> free_space(cache, 3, batch=1, tokens=2, dtype=torch.float32).layers[0][0].shape
        torch.Size([1, 12, 2, 8])
    """
    if len(cache.chunks) != 1 or cache.storage != "full" or cache.text is None:
        return None
    (chunk,) = cache.chunks
    if chunk.room is None or not _fits(chunk, chunk.room, count):
        return None
    alike = (batch, tokens * chunk.room.frames, dtype)
    if any((base.shape[0], base.shape[1], base.dtype) != alike for base in tensors_of(chunk.room.layers)):
        return None
    return FreeSpace(room=chunk.room, count=count, layers=chunk.room.beyond(count))


def window(cache: KVCache, *, size: int | None, sink: int = 0) -> KVCache:
    """The cache with its first `sink` frames and as many of its last as make `size` in all.

    Args:
        cache: is not changed.
        size: frames to keep; None keeps all.
        sink: first frames that are never dropped.

    Raises:
        ShapeError: size is smaller than sink.

    Source: attention sinks, arXiv 2309.17453; the rolling cache of Self-Forcing, arXiv 2506.08009, section 3.4.

    Example: see `KVCache`.
    """
    if size is None or cache.frames <= size:
        return cache
    if size < sink:
        raise ShapeError(
            f"a context of {size} frames cannot hold {sink} sink frames; make the window larger or the sink smaller"
        )
    keep = set(range(sink)) | set(range(cache.frames - (size - sink), cache.frames))
    chunks, offset = [], 0
    for chunk in cache.chunks:
        kept = [i for i in range(len(chunk.positions)) if offset + i in keep]
        runs: list[list[int]] = []
        for i in kept:
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        chunks += [chunk.take(run[0], run[-1] + 1) for run in runs]
        offset += len(chunk.positions)
    return dataclasses.replace(cache, chunks=tuple(chunks))


def forget_text(cache: KVCache) -> KVCache:
    """The cache without its text keys and values: the next pass reads its own prompt, which may be another one.

    Example:
        >>> kv = ((torch.zeros(1, 3, 2, 8),) * 4,)
        >>> forget_text(append(KVCache(), kv, (0, 1, 2))).text is None
        True
    """
    return dataclasses.replace(cache, text=None)


def take_rows(cache: KVCache, start: int, stop: int) -> KVCache:
    """The cache of the samples from `start` up to `stop`, as views.

    Example:
        >>> kv = ((torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)),)
        >>> take_rows(append(KVCache(), kv, (0, 1, 2)), 0, 1).layer(0)[0].shape
        torch.Size([1, 6, 2, 8])
    """

    def rows(tensor: Tensor) -> Tensor:
        return tensor[start:stop]

    chunks = tuple(Chunk(layers=each_of(chunk.layers, rows), positions=chunk.positions) for chunk in cache.chunks)
    text = None if cache.text is None else tuple((rows(k), rows(v)) for k, v in cache.text)
    return dataclasses.replace(cache, chunks=chunks, text=text)


def detach(cache: KVCache) -> KVCache:
    """The cache without history for backward.

    Example:
        >>> detach(KVCache()).frames
        0
    """
    chunks = tuple(dataclasses.replace(chunk, layers=each_of(chunk.layers, Tensor.detach)) for chunk in cache.chunks)
    return dataclasses.replace(cache, chunks=chunks)


def straight_through(context: Sequence[LayerKV], exit_kv: Sequence[LayerKV]) -> tuple[LayerKV, ...]:
    """Keys and values with the context pass's values and the exit step's gradient: `context + (exit - stopgrad(exit))`.

    Args:
        context: what the context pass returned (no gradient).
        exit_kv: what the exit step returned for the same frames.

    Source: what the public Self-Forcing code's in-place cache amounts to (measured).

    Example:
        >>> one, w = torch.ones(1), torch.ones(1, requires_grad=True)
        >>> ((k, *_),) = straight_through([(one * 2,) * 4], [(w * 3,) * 4])
        >>> k.item(), torch.autograd.grad(k.sum(), w)[0].item()
        (2.0, 3.0)
    """

    def join(value: Tensor, path: Tensor) -> Tensor:
        return value.detach() + (path - path.detach())

    return tuple((join(c[0], e[0]), join(c[1], e[1]), c[2], c[3]) for c, e in zip(context, exit_kv, strict=True))


def _codes(values: Tensor | Packed) -> Tensor:
    return values if isinstance(values, Tensor) else values.codes


def _flatten_cache(cache: KVCache):
    context = tuple(chunk.positions for chunk in cache.chunks), cache.rope, cache.storage, cache.reserve
    return [tuple(chunk.layers for chunk in cache.chunks), cache.text], context


def _unflatten_cache(values, context) -> KVCache:
    (layers, text), (positions, rope, storage, reserve) = values, context
    chunks = tuple(Chunk(layers=found, positions=place) for found, place in zip(layers, positions, strict=True))
    return KVCache(chunks=chunks, text=text, rope=rope, storage=storage, reserve=reserve)


pytree.register_pytree_node(KVCache, _flatten_cache, _unflatten_cache, serialized_type_name="sftk.functional.cache.KVCache")
