"""The flow-matching schedule: what share of noise a timestep stands for, and how a step list is warped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from sftk.errors import ShapeError

ScheduleName = Literal["continuous", "table"]
TIMESTEPS = 1000
"""Timesteps run from 0 (clean) to 1000 (noise)."""


def shift_sigma(sigma, shift: float):
    """`k s / (1 + (k - 1) s)`: moves noise levels towards 1 for k > 1. Works on floats and tensors in [0, 1].

    Source: Esser et al., arXiv 2403.03206, eq. 23.

    Example:
        >>> shift_sigma(0.75, 5.0)
        0.9375
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma, shift: float):
    """The inverse of `shift_sigma`.

    Example:
        >>> unshift_sigma(0.9375, 5.0)
        0.75
    """
    return sigma / (shift - (shift - 1) * sigma)


def shift_problems(options: Mapping[str, Any], frames: int | None = None) -> Iterator[tuple[str, str]]:
    """Checks the option `shift`, for `@transform(check=)`.

    Example:
        >>> list(shift_problems({"shift": 0.0}))
        [('shift', 'a shift is above 0, found 0.0')]
    """
    if options["shift"] <= 0:
        yield "shift", f"a shift is above 0, found {options['shift']}"


def sigma_table(shift: float, count: int = TIMESTEPS, *, device: torch.device | None = None) -> Tensor:
    """The table of `count` shifted sigmas from 1 downwards, without 0, that the public code looks timesteps up in.

    Returns:
        [count] float32, descending.

    Example:
        >>> sigma_table(5.0)[[0, 250, 999]]
        tensor([1.0000, 0.9375, 0.0050])
    """
    return shift_sigma(torch.linspace(1, 0, count + 1, device=device)[:-1], shift)


def table_index(timestep: Tensor, shift: float, count: int = TIMESTEPS) -> Tensor:
    """Index of the table entry whose timestep is nearest.

    Args:
        timestep: any shape, in [0, 1000].

    Returns:
        int64 of the same shape.

    Example:
        >>> table_index(torch.tensor([937.5, 0.0]), 5.0)
        tensor([250, 999])
    """
    entries = sigma_table(shift, count, device=timestep.device) * TIMESTEPS
    return (timestep.float()[..., None] - entries).abs().argmin(dim=-1)


def timestep_to_sigma(timestep: Tensor, schedule: ScheduleName = "continuous", shift: float = 1.0) -> Tensor:
    """Share of noise at a timestep.

    Args:
        timestep: any shape, in [0, 1000].
        schedule: `continuous` is `timestep / 1000`, exact, 0 is clean; `table` is the nearest entry of the shifted table,
            as the public code does it (timestep 0 is then its last entry, not 0).
        shift: the table's; `continuous` does not use it.

    Returns:
        Same shape, floating point, in [0, 1].

    Example:
        >>> timestep_to_sigma(torch.tensor([500.0, 0.0]))
        tensor([0.5000, 0.0000])
        >>> timestep_to_sigma(torch.tensor([500.0, 0.0]), "table", 5.0)
        tensor([0.5006, 0.0050])
    """
    timestep = timestep if timestep.is_floating_point() else timestep.float()
    if schedule == "continuous":
        return timestep / TIMESTEPS
    return sigma_table(shift, device=timestep.device)[table_index(timestep, shift)].to(timestep.dtype)


def frame_timesteps(latents: Tensor, timestep: float) -> Tensor:
    """One timestep for every frame.

    Args:
        latents: [B, F, ...].
        timestep: in [0, 1000].

    Returns:
        [B, F] on the latents' device, at least float32 whatever their dtype: bfloat16 cannot hold every timestep.

    Example:
        >>> frame_timesteps(torch.zeros(1, 2, 4, 2, 2, dtype=torch.bfloat16), 937.5)
        tensor([[937.5000, 937.5000]])
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return torch.full(latents.shape[:2], timestep, device=latents.device, dtype=dtype)


def warp_steps(steps: Sequence[float], shift: float, warp: bool = True) -> tuple[float, ...]:
    """A step list on the shifted time axis: `1000 shift(t / 1000)` for each t, or the list as it stands.

    Raises:
        ShapeError: the list is empty, does not descend, or leaves [0, 1000].

    Example:
        >>> warp_steps([1000, 750, 500, 250], 5.0)
        (1000.0, 937.5, 833.3333333333334, 625.0)
    """
    check_steps(steps)
    if not warp:
        return tuple(float(t) for t in steps)
    return tuple(TIMESTEPS * shift_sigma(t / TIMESTEPS, shift) for t in steps)


def check_steps(steps: Sequence[float]) -> None:
    """Checks a step list.

    Raises:
        ShapeError: it is empty, does not descend strictly, or leaves [0, 1000].
    """
    if not steps:
        raise ShapeError("the step list is empty; expected timesteps from 1000 downwards, such as [1000, 750, 500, 250]")
    outside = [t for t in steps if not 0 <= t <= TIMESTEPS]
    if outside:
        raise ShapeError(f"the steps {outside} lie outside [0, {TIMESTEPS}]")
    for before, after in pairwise(steps):
        if after >= before:
            raise ShapeError(f"steps must descend, found {after} after {before} in {list(steps)}")


def training_weights(shift: float, count: int = TIMESTEPS) -> Tensor:
    """Weight of each table entry in flow-matching training: a bell around timestep 500 that sums to `count`.

    `exp(-2 ((t - 500) / 1000)^2)`, minus its minimum, scaled.

    Returns:
        [count] float32.

    Example:
        >>> round(training_weights(5.0).sum().item(), 2)
        1000.0
    """
    timesteps = sigma_table(shift, count) * TIMESTEPS
    bell = torch.exp(-2 * ((timesteps - TIMESTEPS / 2) / TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (count / bell.sum())


def euler_step(sample: Tensor, flow: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step of the probability-flow ODE, `x + v (sigma_next - sigma)`, element by element.

    Args:
        sample, flow: [B, ...].
        sigma, sigma_next: [B] or [B, F], in [0, 1].

    Example:
        >>> euler_step(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1.0]), torch.tensor([0.25]))
        tensor([[0.2500, 0.2500]])
    """
    step = sigma_next - sigma
    return sample + flow * step.reshape(step.shape + (1,) * (sample.dim() - step.dim())).to(sample.dtype)


def next_table_sigma(timestep: Tensor, shift: float, count: int = TIMESTEPS, *, whole_batch_end: bool = False) -> Tensor:
    """Sigma of the table entry after each timestep's; 0 after the last.

    Args:
        timestep: [B].
        whole_batch_end: as the public code: one element at the last entry sends every element to 0.

    Example:
        >>> next_table_sigma(torch.tensor([1000.0, 0.0]), 1.0)
        tensor([0.9990, 0.0000])
    """
    index = table_index(timestep, shift, count)
    table = torch.cat([sigma_table(shift, count, device=timestep.device), torch.zeros(1, device=timestep.device)])
    after = table[index + 1]
    if whole_batch_end:
        return torch.where((index == count - 1).any(), torch.zeros_like(after), after)
    return after


def inference_timesteps(steps: int, shift: float) -> tuple[float, ...]:
    """Timesteps of a many-step sampler, from 1000 downwards, without the final 0.

    Example:
        >>> inference_timesteps(4, 1.0)
        (1000.0, 750.0, 500.0, 250.0)
    """
    return tuple(TIMESTEPS * shift_sigma(1 - i / steps, shift) for i in range(steps))
