"""Keyed randomness: every draw is a function of (seed, phase, update, name, global sample index)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from sftk.errors import ShapeError
from sftk.functional.host import on_device


@attrs.frozen(kw_only=True)
class Key:
    """Where a step's random numbers come from. A host value: it holds no generator and no state.

    The same sample gets the same numbers however a batch is split over ranks and micro-batches. `integers` leaves out the
    sample index, so that all ranks agree on exit steps and lengths.

    Args:
        seed: of the run.
        phase: name of the phase that draws.
        update: number of the update, counted from 0.
        samples: global index of each sample in the batch.

    Example:
        >>> both, second = Key(seed=1, samples=(4, 5)), Key(seed=1, samples=(5,))
        >>> torch.equal(both.normal("noise", (2,))[1:], second.normal("noise", (2,)))
        True
    """

    seed: int
    phase: str = ""
    update: int = 0
    samples: tuple[int, ...] = (0,)

    def normal(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[B, *shape] standard normal. Drawn in float32 on the device, then cast, so that every dtype gets the same noise."""
        out = torch.empty(len(self.samples), *shape, device=device)
        if out.is_meta:
            return out.to(dtype)
        for row, generator in zip(out, self._generators(name, device), strict=True):
            row.normal_(generator=generator)
        return out.to(dtype)

    def uniform(self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """[B, *shape] float32, uniform in [0, 1). Made of hashes on the host: few numbers, the same on every device."""
        count = math.prod(shape)
        values = [self._number(name, f"{sample}/{i}") // 2**40 / 2**24 for sample in self.samples for i in range(count)]
        return on_device(values, device).reshape(len(self.samples), *shape)

    def integers(self, name: str, low: int, high: int, count: int) -> tuple[int, ...]:
        """`count` host integers in [low, high), equal for all samples and ranks."""
        return tuple(low + self._number(name, f"#{i}") % (high - low) for i in range(count))

    def _generators(self, name: str, device: torch.device | str):
        generator = torch.Generator(device=device)
        for sample in self.samples:
            yield generator.manual_seed(self._number(name, sample) % 2**63)

    def _number(self, name: str, sample: int | str) -> int:
        text = f"{self.seed}|{self.phase}|{self.update}|{name}|{sample}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@attrs.frozen(kw_only=True)
class RecordedKey:
    """A key that returns given tensors instead of drawing, to replay a recorded run.

    Args:
        tensors: name to [B, ...] tensor.
        choices: name to host integers.

    Example:
        >>> key = RecordedKey(tensors={"noise": torch.ones(1, 2)}, choices={"exit": (2,)})
        >>> key.normal("noise", (2,)), key.integers("exit", 0, 4, 1)
        (tensor([[1., 1.]]), (2,))
    """

    tensors: dict[str, Tensor] = attrs.field(factory=dict)
    choices: dict[str, tuple[int, ...]] = attrs.field(factory=dict)

    def normal(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The recorded tensor of that name.

        Raises:
            ShapeError: there is none, or it has another shape.
        """
        if name not in self.tensors:
            raise ShapeError(f"no tensor {name!r} was recorded, only {sorted(self.tensors)}")
        found = self.tensors[name]
        if found.shape[1:] != torch.Size(shape):
            raise ShapeError(f"the recorded tensor {name!r} has shape {list(found.shape)}, expected [B, {list(shape)}]")
        return found.to(device=device, dtype=dtype)

    uniform = normal

    def integers(self, name: str, low: int, high: int, count: int) -> tuple[int, ...]:
        """The first `count` recorded integers of that name.

        Raises:
            ShapeError: there are too few.
        """
        found = self.choices.get(name, ())
        if len(found) < count or not all(low <= value < high for value in found[:count]):
            raise ShapeError(f"need {count} integers in [{low}, {high}) recorded as {name!r}, found {list(found)}")
        return tuple(found[:count])


def normal_like(key: Key | RecordedKey, name: str, like: Tensor) -> Tensor:
    """Standard normal noise of another tensor's shape, device and dtype, each sample's its own.

    Args:
        like: [B, ...].

    Raises:
        ShapeError: the key is of another number of samples than the batch.

    Example:
        >>> normal_like(Key(seed=0, samples=(0, 1)), "noise", torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    return _of_batch(key.normal(name, like.shape[1:], device=like.device, dtype=like.dtype), name, like)


def uniform_like(key: Key | RecordedKey, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, *shape] float32, uniform in [0, 1), for the samples of another tensor and on its device.

    Args:
        like: [B, ...].

    Raises:
        ShapeError: the key is of another number of samples than the batch.

    Example:
        >>> uniform_like(Key(seed=0, samples=(0, 1)), "drop", torch.zeros(2, 3), (1,)).shape
        torch.Size([2, 1])
    """
    return _of_batch(key.uniform(name, shape, device=like.device), name, like)


def _of_batch(drawn: Tensor, name: str, like: Tensor) -> Tensor:
    """What was drawn; numbers of one sample would otherwise be broadcast over a batch without a word."""
    if drawn.shape[0] != like.shape[0]:
        raise ShapeError(
            f"the key draws {name!r} for {drawn.shape[0]} samples, the batch has {like.shape[0]}; give Key(samples=...) the "
            "global index of each"
        )
    return drawn
