"""Named data sets: what a recipe's `data.use` may say, and which keys their batches hold."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor
from torch.utils.data import default_collate

from sftk.core.options import describe, describe_value, matches
from sftk.data.digits import DigitClips, collate, decode_latents, embed_prompts
from sftk.data.random_clips import RandomClips
from sftk.errors import SpecError, did_you_mean


@attrs.frozen(kw_only=True)
class DataSource:
    """A data set that recipes can name.

    Args:
        make: `make(frames=..., seed=..., **options)` returns a map-style data set whose samples depend on their index alone.
        collate: samples to a batch, a mapping of tensors and lists.
        keys: tensors of a batch that graphs can read.
        embed: prompts to embeddings [B, L, D]; the empty prompt is the unconditional one. None when it has no texts.
        decode: latents [B, F, C, H, W] to frames in [0, 1], [B, F, H, W] or [B, F, 3, H, W].
        fps: frames a second at which its videos are shown.
        sample_shape: channels, height and width of its latents, or None when they depend on the data.
        needs_shape: `make` takes channels, height and width as well.
    """

    make: Callable[..., Any]
    collate: Callable[[Any], dict[str, Any]]
    keys: tuple[str, ...]
    embed: Callable[..., Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    fps: int = 16
    sample_shape: tuple[int, int, int] | None = None
    needs_shape: bool = False

    def build(self, *, frames: int, channels: int, height: int, width: int, seed: int, options: Mapping[str, Any]) -> Any:
        """The data set for latents of this size."""
        shape = {"channels": channels, "height": height, "width": width} if self.needs_shape else {}
        return self.make(frames=frames, seed=seed, **shape, **options)

    @property
    def options(self) -> dict[str, Any]:
        """Options that a recipe may set, with their annotations."""
        hints = typing.get_type_hints(self.make.__init__ if inspect.isclass(self.make) else self.make)
        names = inspect.signature(self.make).parameters
        given = ("frames", "seed", *(("channels", "height", "width") if self.needs_shape else ()))
        return {name: hints.get(name, Any) for name in names if name not in given}


SOURCES: dict[str, DataSource] = {
    "digits": DataSource(
        make=DigitClips,
        collate=collate,
        keys=("latents", "prompt_embeds", "negative_embeds"),
        embed=embed_prompts,
        decode=decode_latents,
        fps=8,
        sample_shape=(4, 8, 8),
    ),
    "random": DataSource(
        make=RandomClips, collate=default_collate, keys=("latents", "prompt_embeds", "negative_embeds"), needs_shape=True
    ),
}
"""Data sets by name; a plugin may add its own."""


def source(name: str) -> DataSource:
    """A named data set.

    Raises:
        SpecError: there is none of that name.

    Example:
        >>> source("digits").keys
        ('latents', 'prompt_embeds', 'negative_embeds')
    """
    if name not in SOURCES:
        raise SpecError(f"unknown data set {name!r}; {did_you_mean(name, SOURCES)}")
    return SOURCES[name]


def data_keys(name: str) -> tuple[str, ...]:
    """Keys of a named data set's batches; none when there is no such data set."""
    return SOURCES[name].keys if name in SOURCES else ()


def data_problems(
    name: str, options: Mapping[str, Any], frames: int, shape: tuple[int, int, int]
) -> Iterator[tuple[tuple[str, ...], str, str | None]]:
    """What is wrong with a recipe's data section: (path, message, hint).

    Example:
        >>> [message for _, message, _ in data_problems("digitz", {}, 21, (4, 8, 8))]
        ["unknown data set 'digitz'"]
    """
    if name not in SOURCES:
        yield ("use",), f"unknown data set {name!r}", did_you_mean(name, SOURCES)
        return
    found = SOURCES[name]
    for key, value in options.items():
        if key not in found.options:
            yield ("with", key), f"{name} has no option {key!r}", did_you_mean(key, found.options)
        elif not matches(value, found.options[key]):
            wanted, got = describe(found.options[key]), describe_value(value)
            yield ("with", key), f"the option {key!r} of {name} takes {wanted}, found {got}", None
    if found.sample_shape is not None and found.sample_shape != shape:
        yield (), f"{name} has latents of {found.sample_shape}, the recipe says {shape} (channels, height, width)", None
