"""What training on intervals of time needs: their ends, drawn, and a warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.keys import Key, uniform_like
from sftk.functional.schedule import TIMESTEPS, shift_problems, shift_sigma


def _interval_example(batch: int, randn) -> dict:
    return {
        "key": Key(seed=3, samples=tuple(range(batch))),
        "like": randn(batch, 3, 4, 2, 2),
        "shift": 3.0,
        "empty": 0.5,
        "spread": (-0.4, 1.0),
    }


def _interval_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if not 0 <= options["empty"] <= 1:
        yield "empty", f"a share lies in [0, 1], found {options['empty']}"
    yield from shift_problems(options)
    if options["spread"] is not None and options["spread"][1] <= 0:
        yield "spread", f"expected [mean, deviation] with a deviation above 0, found {list(options['spread'])}"


@transform(out=("timestep", "interval"), kind="keyed", example=_interval_example, check=_interval_check)
def draw_interval(
    key: Key,
    like: Tensor,
    *,
    shift: float = 1.0,
    empty: float = 0.75,
    spread: tuple[float, float] | None = None,
    name: str = "interval",
):
    """Timesteps and the intervals below them over which an average velocity is learned; the same for all frames of a sample.

    Two times are drawn; the later is the timestep, their distance the interval.

    Args:
        key: where the numbers come from.
        like: [B, F, ...].
        shift: of the time axis, see `shift_sigma`.
        empty: share of samples whose interval is 0, where the average is the flow itself.
        spread: mean and deviation of the times' logit (before the shift); None draws them uniformly.
        name: tells draws of one step apart.

    Returns:
        timestep: [B, F] float32, in [0, 1000]. interval: [B, F] float32, in [0, timestep].

    Source: MeanFlow, arXiv 2505.13447, section 4.3 and table 1 (its best: 75% empty, logit-normal with -0.4 and 1).

    Example:
        >>> t, d = draw_interval(Key(seed=0, samples=(0, 1)), torch.zeros(2, 6, 1), empty=0.0)
        >>> t.shape, bool((d >= 0).all() and (d <= t).all())
        (torch.Size([2, 6]), True)
    """
    times = uniform_like(key, name, like, (2,))
    if spread is not None:
        times = torch.sigmoid(spread[0] + spread[1] * torch.special.ndtri(times.clamp(1e-6, 1 - 1e-6)))
    times = shift_sigma(times, shift) * TIMESTEPS
    timestep, end = times.amax(dim=1, keepdim=True), times.amin(dim=1, keepdim=True)
    is_empty = uniform_like(key, f"{name}/empty", like, (1,)) < empty
    interval = torch.where(is_empty, torch.zeros_like(end), timestep - end)
    return timestep.expand(-1, like.shape[1]), interval.expand(-1, like.shape[1])


def _ramp_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["updates"] < 0:
        yield "updates", f"expected at least 0 updates, found {options['updates']}"


@transform(
    out="ramp", kind="host", example=lambda batch, randn: {"key": Key(seed=0, update=3), "updates": 4}, check=_ramp_check
)
def ramp(key: Key, *, updates: int = 0):
    """A share that rises from 0 to 1 over the first updates of a run: a warm-up.

    Args:
        key: knows the update.
        updates: how long; 0 is no warm-up.

    Returns:
        ramp: a host number in [0, 1].

    Example:
        >>> ramp(Key(seed=0, update=3), updates=4)
        0.75
    """
    return 1.0 if updates == 0 else min(1.0, key.update / updates)
