"""Draws from a list of timesteps: the student's steps, the states of a stored ODE, a grid's intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sftk.core.geometry import block_problems, split_blocks
from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional.host import on_device
from sftk.functional.keys import Key, uniform_like
from sftk.functional.sampling import Per, spread_blocks
from sftk.functional.schedule import check_steps, inference_timesteps, shift_problems, warp_steps


def draw_index(key: Key, like: Tensor, count: int, per: Per, blocks: tuple[int, ...], name: str) -> Tensor:
    """[B, F] int64, uniform in 0 .. count - 1, one for each sample, block or frame.

    Args:
        key: where the numbers come from.
        like: [B, F, ...].
        blocks: lengths of the blocks, for `per: block`: frames take the value of their block's first frame.

    Example:
        >>> draw_index(Key(seed=0), torch.zeros(1, 4), 1, "block", (1, 3), "step")
        tensor([[0, 0, 0, 0]])
    """
    u = uniform_like(key, name, like, (1 if per == "sample" else like.shape[1],))
    index = (u * count).long().clamp(max=count - 1)
    return spread_blocks(index, blocks) if per == "block" else index.expand(-1, like.shape[1])


def _step_example(batch: int, randn) -> dict:
    return {
        "key": Key(seed=3, samples=tuple(range(batch))),
        "like": randn(batch, 6, 4, 2, 2),
        "steps": (1000.0, 750.0, 500.0, 250.0, 0.0),
        "shift": 5.0,
        "keep_zero": True,
    }


def _kept_steps(steps: Sequence[float], keep_zero: bool) -> tuple[float, ...]:
    """A step list without its trailing 0, unless that is kept."""
    return tuple(steps[:-1] if steps and steps[-1] == 0 and not keep_zero else steps)


def _step_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    yield from block_problems(options, frames)
    yield from shift_problems(options)
    try:
        check_steps(_kept_steps(options["steps"], options["keep_zero"]))
    except ShapeError as error:
        yield "steps", str(error)
    if options["image_to_video"] and (not options["keep_zero"] or 0 not in options["steps"]):
        yield "image_to_video", "the first frame is taken clean; it needs a step list that ends in 0, and `keep_zero`"


@transform(out=("step_index", "timestep"), kind="keyed", example=_step_example, check=_step_check)
def draw_step(
    key: Key,
    like: Tensor,
    *,
    steps: Sequence[float],
    shift: float = 1.0,
    warp: bool = True,
    keep_zero: bool = False,
    per: Per = "block",
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
    image_to_video: bool = False,
    name: str = "step",
):
    """One entry of the student's step list for each block.

    Args:
        key: where the numbers come from.
        like: [B, F, ...].
        steps, shift, warp: the list, see `warp_steps`.
        keep_zero: a trailing 0 may be drawn, too (ODE regression); otherwise it is dropped, as in a rollout.
        per: one entry for each sample, block or frame.
        frames_per_block, independent_first_frame: the blocks.
        image_to_video: the first frame gets the last entry: it is given clean.
        name: tells draws of one step apart.

    Returns:
        step_index: [B, F] int64, place in the list. timestep: [B, F] float32.

    Source: ODE initialisation, CausVid, arXiv 2412.07772, section 4.3.

    Example:
        >>> draw_step(Key(seed=0), torch.zeros(1, 3), steps=[1000, 500])[1].unique() in torch.tensor([1000.0, 500.0])
        True
    """
    kept = _kept_steps(steps, keep_zero)
    times = on_device(warp_steps(kept, shift, warp), like.device, torch.float32)
    blocks = split_blocks(like.shape[1], frames_per_block, independent_first_frame) if per == "block" else ()
    index = draw_index(key, like, len(kept), per, blocks, name)
    if image_to_video:
        index = torch.cat([torch.full_like(index[:, :1], len(kept) - 1), index[:, 1:]], dim=1)
    return index, times[index]


@transform(out="clean", kind="per_sample", example=lambda batch, randn: {"ode_latents": randn(batch, 3, 3, 4, 2, 2)})
def clean_state(ode_latents: Tensor):
    """The clean end of stored ODE trajectories.

    Args:
        ode_latents: [B, S, F, C, H, W], noisiest first, the clean end last.

    Returns:
        clean: [B, F, C, H, W].

    Example:
        >>> clean_state(torch.arange(3.0).reshape(1, 3, 1, 1, 1, 1)).item()
        2.0
    """
    return ode_latents[:, -1]


def _states_example(batch: int, randn) -> dict:
    index = torch.tensor([[0, 0, 2]]).expand(batch, -1)
    return {"ode_latents": randn(batch, 3, 3, 4, 2, 2), "step_index": index, "timestep": 500.0 * (2 - index)}


@transform(out=("noisy", "x0", "gradient_mask"), kind="per_sample", example=_states_example)
def pick_ode_states(ode_latents: Tensor, step_index: Tensor, timestep: Tensor):
    """Of stored ODE trajectories: each frame's state at its step, the clean end, and which frames have something to learn.

    Args:
        ode_latents: [B, S, F, C, H, W], noisiest first, the clean end last.
        step_index: [B, F] int64, below S.
        timestep: [B, F]; frames at 0 are clean already.

    Returns:
        noisy: [B, F, C, H, W]. x0: [B, F, C, H, W]. gradient_mask: [B, F] bool, False where the state is clean.

    Raises:
        ShapeError: the trajectories have another number of frames.

    Source: CausVid, arXiv 2412.07772, section 4.3.

    Example:
        >>> states = torch.arange(3.0).reshape(1, 3, 1, 1, 1, 1)
        >>> noisy, x0, mask = pick_ode_states(states, torch.tensor([[1]]), torch.tensor([[500.0]]))
        >>> noisy.item(), x0.item(), mask.item()
        (1.0, 2.0, True)
    """
    if ode_latents.dim() != 6 or ode_latents.shape[2] != step_index.shape[1]:
        raise ShapeError(
            f"ODE trajectories must be [B, S, {step_index.shape[1]}, C, H, W], found {list(ode_latents.shape)}; "
            "were the pairs made with another number of frames?"
        )
    index = step_index[:, None, :, None, None, None].expand(-1, 1, -1, *ode_latents.shape[3:])
    return ode_latents.gather(1, index)[:, 0], ode_latents[:, -1], timestep != 0


def _grid_example(batch: int, randn) -> dict:
    return {"key": Key(seed=3, samples=tuple(range(batch))), "like": randn(batch, 6, 4, 2, 2), "intervals": 8, "shift": 5.0}


def _grid_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    yield from block_problems(options, frames)
    yield from shift_problems(options)
    if options["intervals"] < 1:
        yield "intervals", f"a grid has at least 1 interval, found {options['intervals']}"


@transform(out=("timestep", "next_timestep"), kind="keyed", example=_grid_example, check=_grid_check)
def draw_grid_step(
    key: Key,
    like: Tensor,
    *,
    intervals: int = 48,
    shift: float = 1.0,
    per: Per = "block",
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
    name: str = "grid_step",
):
    """Two neighbouring timesteps of a solver's grid.

    Args:
        key: where the numbers come from.
        like: [B, F, ...].
        intervals: of the grid, evenly spaced from 1000 to 0 before the shift.
        shift: see `shift_sigma`.
        per: one interval for each sample, block or frame.
        frames_per_block, independent_first_frame: the blocks.
        name: tells draws of one step apart.

    Returns:
        timestep: [B, F] float32, the noisier end. next_timestep: [B, F], the other one.

    Source: consistency distillation, arXiv 2303.01469, algorithm 2.

    Example:
        >>> [t.item() for t in draw_grid_step(Key(seed=0), torch.zeros(1, 1), intervals=1, frames_per_block=1)]
        [1000.0, 0.0]
    """
    grid = on_device((*inference_timesteps(intervals, shift), 0.0), like.device, torch.float32)
    blocks = split_blocks(like.shape[1], frames_per_block, independent_first_frame) if per == "block" else ()
    index = draw_index(key, like, intervals, per, blocks, name)
    return grid[index], grid[index + 1]
