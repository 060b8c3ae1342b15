"""Many-step sampling of the probability-flow ODE, of whole clips or block by block, as transforms that a fold runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.cache import KVCache
from sftk.functional.guided import guided_flow
from sftk.functional.multistep import MultistepSolver, SolverName, start_multistep
from sftk.functional.plan import Block, Step
from sftk.functional.predict import Denoiser, toy_denoiser
from sftk.functional.schedule import TIMESTEPS, euler_step, frame_timesteps, inference_timesteps, shift_problems


def _check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["steps"] < 1:
        yield "steps", f"a solver takes at least 1 step, found {options['steps']}"
    yield from shift_problems(options)


@transform(out=("ode_steps", "solver"), kind="host", example=lambda batch, randn: {"steps": 4}, check=_check)
def plan_ode(*, steps: int = 50, shift: float = 1.0, solver: SolverName = "euler"):
    """The steps of an ODE solver, evenly spaced before the shift, from 1000 to 0.

    Args:
        steps: how many; at least 1.
        shift: see `shift_sigma`.
        solver: `euler`, or a multistep one of diffusers, on that scheduler's own timesteps: `unipc` or `dpm++`.

    Returns:
        ode_steps: tuple of `Step`; the last one's `next_timestep` is 0. solver: what it remembers between steps, a
        `MultistepSolver`; None is Euler's method, which remembers nothing.

    Raises:
        SftkError: the solver needs diffusers.

    Example:
        >>> [(step.timestep, step.next_timestep) for step in plan_ode(steps=2)[0]]
        [(1000.0, 500.0), (500.0, 0.0)]
        >>> [step.timestep for step in plan_ode(steps=2, shift=5.0, solver="dpm++")[0]]
        [999.0, 833.0]
    """
    assert solver in get_args(SolverName)
    if solver != "euler":
        multistep, plan = start_multistep(solver, steps, shift)
        return plan, multistep
    times = (*inference_timesteps(steps, shift), 0.0)
    return tuple(Step(index=i, timestep=times[i], next_timestep=times[i + 1]) for i in range(steps)), None


def _predict_example(batch: int, randn) -> dict:
    return {
        "denoiser": toy_denoiser,
        "noisy": randn(batch, 3, 4, 2, 2),
        "step": Step(index=0, timestep=1000.0, next_timestep=500.0),
        "prompt_embeds": randn(batch, 2, 8),
        "negative_embeds": randn(batch, 2, 8),
        "scale": 3.0,
    }


@transform(out="flow", kind="per_sample", models=("denoiser",), example=_predict_example)
def predict_step(
    denoiser: Denoiser,
    noisy: Tensor,
    step: Step,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    block: Block | None = None,
    cache: KVCache | None = None,
    given_frames: Tensor | None = None,
    *,
    scale: float = 1.0,
    batched: bool = False,
    average: bool = False,
):
    """The guided flow at a solver's step, of a bidirectional model, or of one block of a causal one given its context.

    Args:
        noisy: [B, F, C, H, W] at the step's timestep; of one block, [B, block.frames, C, H, W].
        step: of `plan_ode`.
        prompt_embeds, negative_embeds: [B, L, D].
        block: says where a causal model's frames stand; None is a bidirectional pass over all frames.
        cache: the context; under guidance that of both conditions, see `commit_context`.
        given_frames: [B, F0, C, H, W] clean frames that a bidirectional pass begins with: they stand at timestep 0.
        scale: guidance; 1 makes one pass only.
        batched: both passes of guidance in one call of twice the batch.
        average: ask the model for its average velocity over the step (MeanFlow), which makes Euler's step exact.

    Returns:
        flow: of noisy's shape.

    Source: flow matching, arXiv 2210.02747; MeanFlow, arXiv 2505.13447.

    Example:
        >>> predict_step(**_predict_example(1, torch.randn)).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    timestep, after = _step_times(noisy, step, given_frames)
    more: dict[str, Any] = {"positions": None if block is None else block.positions}
    if average:
        more["interval"] = timestep - after
    noisy = hold_frames(noisy, given_frames)
    return guided_flow(
        denoiser, noisy, timestep, prompt_embeds, negative_embeds, scale=scale, batched=batched, cache=cache, **more
    )


def _advance_example(batch: int, randn) -> dict:
    step = Step(index=0, timestep=1000.0, next_timestep=500.0)
    given = randn(batch, 1, 4, 2, 2)
    return {"noisy": randn(batch, 3, 4, 2, 2), "flow": randn(batch, 3, 4, 2, 2), "step": step, "given_frames": given}


@transform(out=("noisy", "solver"), kind="per_sample", example=_advance_example)
def solver_step(
    noisy: Tensor, flow: Tensor, step: Step, solver: MultistepSolver | None = None, given_frames: Tensor | None = None
):
    """One step of an ODE solver along a flow.

    Args:
        noisy: [B, F, C, H, W] at the step's timestep. flow: what `predict_step` found there.
        step: of `plan_ode`.
        solver: what is remembered of the steps before; None is Euler's method.
        given_frames: [B, F0, C, H, W] clean frames, which stay.

    Returns:
        noisy: at the step's next timestep. solver: for the next step; the given one is unchanged.

    Source: flow matching, arXiv 2210.02747, sampled with Euler's method; MeanFlow, arXiv 2505.13447, eq. 12; see
    `MultistepSolver` for the others.

    Example:
        >>> solver_step(**_advance_example(1, torch.randn))[0].shape
        torch.Size([1, 3, 4, 2, 2])
    """
    if solver is not None:
        noisy, solver = solver.step(noisy, flow)
    else:
        timestep, after = _step_times(noisy, step, given_frames)
        noisy = euler_step(noisy, flow, timestep / TIMESTEPS, after / TIMESTEPS)
    return hold_frames(noisy, given_frames), solver


def hold_frames(latents: Tensor, given_frames: Tensor | None) -> Tensor:
    """The latents with their first frames replaced by given ones.

    Args:
        latents: [B, F, C, H, W].
        given_frames: [B, F0, C, H, W]; None changes nothing.

    Example:
        >>> hold_frames(torch.zeros(1, 3, 1), torch.ones(1, 1, 1)).flatten()
        tensor([1., 0., 0.])
    """
    return latents if given_frames is None else torch.cat([given_frames, latents[:, given_frames.shape[1] :]], dim=1)


def _step_times(noisy: Tensor, step: Step, given_frames: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, F] each: the timesteps of a step's start and end; given frames stand at 0."""
    assert step.next_timestep is not None
    timestep, after = frame_timesteps(noisy, step.timestep), frame_timesteps(noisy, step.next_timestep)
    if given_frames is None:
        return timestep, after
    count = given_frames.shape[1]
    zero = torch.zeros_like(timestep[:, :count])
    return torch.cat([zero, timestep[:, count:]], dim=1), torch.cat([zero, after[:, count:]], dim=1)
