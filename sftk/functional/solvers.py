"""Many-step sampling of the probability-flow ODE, of whole clips or block by block, as transforms that a fold runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.cache import KVCache
from sftk.functional.guidance import guide
from sftk.functional.plan import Block, Step
from sftk.functional.predict import Denoiser, toy_denoiser
from sftk.functional.schedule import TIMESTEPS, euler_step, frame_timesteps, inference_timesteps


def _check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["steps"] < 1:
        yield "steps", f"a solver takes at least 1 step, found {options['steps']}"


@transform(out="ode_steps", kind="host", example=lambda batch, randn: {"steps": 4}, check=_check)
def plan_ode(*, steps: int = 50, shift: float = 1.0):
    """The steps of an ODE solver, evenly spaced before the shift, from 1000 to 0.

    Args:
        steps: how many; at least 1.
        shift: see `shift_sigma`.

    Returns:
        ode_steps: tuple of `Step`; the last one's `next_timestep` is 0.

    Example:
        >>> [(step.timestep, step.next_timestep) for step in plan_ode(steps=2)]
        [(1000.0, 500.0), (500.0, 0.0)]
    """
    times = (*inference_timesteps(steps, shift), 0.0)
    return tuple(Step(index=i, timestep=times[i], next_timestep=times[i + 1]) for i in range(steps))


def _example(batch: int, randn) -> dict:
    return {
        "denoiser": toy_denoiser,
        "noisy": randn(batch, 3, 4, 2, 2),
        "step": Step(index=0, timestep=1000.0, next_timestep=500.0),
        "prompt_embeds": randn(batch, 2, 8),
        "negative_embeds": randn(batch, 2, 8),
        "scale": 3.0,
    }


@transform(out="noisy", kind="per_sample", models=("denoiser",), example=_example)
def ode_step(
    denoiser: Denoiser,
    noisy: Tensor,
    step: Step,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    block: Block | None = None,
    cache: KVCache | None = None,
    negative_cache: KVCache | None = None,
    given_frames: Tensor | None = None,
    *,
    scale: float = 1.0,
    average: bool = False,
):
    """One guided Euler step of a bidirectional model, or of one block of a causal one given the frames in its caches.

    Args:
        noisy: [B, F, C, H, W] at the step's timestep; of one block, [B, block.frames, C, H, W].
        prompt_embeds, negative_embeds: [B, L, D].
        block: says where a causal model's frames stand; None is a bidirectional pass over all frames.
        cache, negative_cache: the context as the conditional and the unconditional pass see it; not changed.
        given_frames: [B, F0, C, H, W] clean frames that a bidirectional pass begins with: they stand at timestep 0 and stay.
        scale: guidance; 1 makes one pass only.
        average: ask the model for its average velocity over the step (MeanFlow), which makes the step exact.

    Returns:
        noisy: at the step's next timestep.

    Source: flow matching, arXiv 2210.02747, sampled with Euler's method; MeanFlow, arXiv 2505.13447, eq. 12.

    Example:
        >>> ode_step(**_example(1, torch.randn)).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    assert step.next_timestep is not None
    timestep, after = frame_timesteps(noisy, step.timestep), frame_timesteps(noisy, step.next_timestep)
    if given_frames is not None:
        count = given_frames.shape[1]
        noisy = torch.cat([given_frames, noisy[:, count:]], dim=1)
        timestep, after = (torch.cat([torch.zeros_like(t[:, :count]), t[:, count:]], dim=1) for t in (timestep, after))
    more: dict[str, Any] = {"positions": None if block is None else block.positions}
    if average:
        more["interval"] = timestep - after
    flow = denoiser(noisy, timestep, prompt_embeds, cache=cache, **more)[0]
    if scale != 1.0:
        flow = guide(flow, denoiser(noisy, timestep, negative_embeds, cache=negative_cache, **more)[0], scale=scale)
    return euler_step(noisy, flow, timestep / TIMESTEPS, after / TIMESTEPS)
