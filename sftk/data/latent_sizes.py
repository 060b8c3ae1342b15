"""Whether latents, of a batch or of a file, have the size that a recipe says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sftk.errors import DataError

AXES: tuple[str, ...] = ("frames", "channels", "height", "width")

GIVEN = {"latents": 4, "ode_latents": 4, "initial_latents": 3}
"""Keys of a batch that hold latents, and how many of a recipe's axes, the last ones, they share: any number of frames may be
given at the start."""


def say_latents(sizes: Mapping[str, int]) -> str:
    """Sizes as a recipe sets them.

    Example:
        >>> say_latents({"channels": 16, "height": 60, "width": 104})
        'set latents: {channels: 16, height: 60, width: 104} in the recipe'
    """
    return f"set latents: {{{', '.join(f'{name}: {size}' for name, size in sizes.items())}}} in the recipe"


def check_size(where: str, found: Sequence[int], wanted: Sequence[int], otherwise: str) -> None:
    """Checks the last axes of latents against a recipe's.

    Args:
        where: what holds the latents, for the message.
        found: a shape.
        wanted: F, C, H, W, or the last of them.
        otherwise: what else than setting the recipe's `latents` would help.

    Raises:
        DataError: they differ.

    Example:
        >>> check_size("clip.safetensors holds", (6, 16, 8, 8), (4, 8, 8), "take another file")
        Traceback (most recent call last):
        sftk.errors.DataError: clip.safetensors holds latents of [6, 16, 8, 8], the recipe says [4, 8, 8] (channels, height, \
width); set latents: {channels: 16, height: 8, width: 8} in the recipe, or take another file
    """
    axes = AXES[-len(wanted) :]
    if tuple(found[-len(wanted) :]) == tuple(wanted):
        return
    message = f"{where} latents of {list(found)}, the recipe says {list(wanted)} ({', '.join(axes)})"
    if len(found) < len(wanted):
        raise DataError(f"{message}; {otherwise}")
    fix = say_latents(dict(zip(axes, found[-len(wanted) :], strict=True)))
    raise DataError(f"{message}; {fix}, or {otherwise}")


def check_batch(name: str, batch: Mapping[str, Any], wanted: Sequence[int]) -> None:
    """Checks what a data set gives against the recipe's latents, before a model sees it.

    Args:
        name: of the data set.
        batch: `latents` [B, F, C, H, W], `ode_latents` [B, S, F, C, H, W] and `initial_latents` [B, F0, C, H, W], where there
            are any, and whatever else.
        wanted: F, C, H, W.

    Raises:
        DataError: a sample has another size.

    Example:
        >>> import torch
        >>> check_batch("mine", {"initial_latents": torch.zeros(2, 1, 4, 8, 8)}, (21, 4, 8, 8))
        >>> check_batch("mine", {"latents": torch.zeros(2, 9, 4, 8, 8)}, (21, 4, 8, 8))
        Traceback (most recent call last):
        sftk.errors.DataError: the data set 'mine' gives, as `latents`, latents of [9, 4, 8, 8], the recipe says [21, 4, 8, 8] \
(frames, channels, height, width); set latents: {frames: 9, channels: 4, height: 8, width: 8} in the recipe, or let the data \
set give that size
    """
    for key, shared in GIVEN.items():
        value = batch.get(key)
        if isinstance(value, Tensor):
            where = f"the data set {name!r} gives, as `{key}`,"
            check_size(where, value.shape[1:], wanted[-shared:], "let the data set give that size")
