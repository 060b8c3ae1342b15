"""The plan of a rollout: which blocks, which steps of each, where gradient flows. Host values only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from sftk.core.geometry import block_problems, split_blocks
from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional.host import on_device
from sftk.functional.keys import Key
from sftk.functional.schedule import TIMESTEPS, check_steps, shift_problems, unshift_sigma, warp_steps


@attrs.frozen(kw_only=True)
class Step:
    """One entry of a step list.

    Args:
        index: place in the list.
        timestep: what the network is told, in [0, 1000].
        next_timestep: of the following entry; None after the last.
    """

    index: int
    timestep: float
    next_timestep: float | None = None


# A dataclass, not attrs: torch.compile can trace its construction.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a rollout.

    Args:
        index: place among the blocks that are generated (or given).
        start: first frame, counted over the whole output.
        frames: how many frames.
        offset: first frame in the tensor that it is taken from (the noise, or the given latents).
        lead: steps before the exit step.
        exit: the step whose x0 is the block's output.
        grad: whether the exit step carries gradient.
        last: whether no block follows.
    """

    index: int
    start: int
    frames: int
    offset: int
    lead: tuple[Step, ...] = ()
    exit: Step | None = None
    grad: bool = True
    last: bool = False

    @property
    def positions(self) -> tuple[int, ...]:
        """Absolute index of each frame."""
        return tuple(range(self.start, self.start + self.frames))


def split_given(frames: int, frames_per_block: int, independent_first_frame: bool) -> tuple[int, ...]:
    """Lengths in which given latents are put into the cache: blocks, or a single image as a block of its own.

    Raises:
        ShapeError: the frames do not divide into blocks.

    Example:
        >>> split_given(1, 3, False), split_given(4, 3, True), split_given(0, 3, False)
        ((1,), (1, 3), ())
    """
    if frames <= 1:
        return (1,) * frames
    return split_blocks(frames, frames_per_block, independent_first_frame)


def _blocks_example(batch: int, randn) -> dict:
    return {"noise": randn(batch, 6, 4, 2, 2), "initial_latents": randn(batch, 1, 4, 2, 2)}


@transform(out=("blocks", "given_blocks"), kind="host", example=_blocks_example, check=block_problems)
def plan_blocks(
    noise: Tensor,
    initial_latents: Tensor | None = None,
    *,
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
):
    """The blocks of a causal sampler, without steps of their own.

    Args:
        noise: [B, F, C, H, W]; only its shape is used.
        initial_latents: [B, F0, C, H, W], frames that are continued.
        frames_per_block: frames that are denoised together.
        independent_first_frame: the first frame is a block of its own.

    Returns:
        blocks: tuple of `Block`, generated ones. given_blocks: those of the initial latents.

    Raises:
        ShapeError: frames do not divide into blocks.

    Example:
        >>> import torch
        >>> blocks, given = plan_blocks(torch.zeros(1, 6, 4, 2, 2), torch.zeros(1, 1, 4, 2, 2))
        >>> [block.positions for block in blocks], len(given)
        ([(1, 2, 3), (4, 5, 6)], 1)
    """
    given = 0 if initial_latents is None else initial_latents.shape[1]
    blocks = _blocks(split_blocks(noise.shape[1], frames_per_block, independent_first_frame and not given), given)
    given_blocks = _blocks(split_given(given, frames_per_block, independent_first_frame), 0, grad=False, last=False)
    return blocks, given_blocks


def _blocks(lengths: Sequence[int], start: int, grad: bool = True, last: bool = True) -> tuple[Block, ...]:
    """Blocks of those lengths, one after the other; `last` marks the one that no block follows."""
    offsets = [sum(lengths[:index]) for index in range(len(lengths))]
    return tuple(
        Block(index=i, start=start + o, frames=n, offset=o, grad=grad, last=last and i == len(lengths) - 1)
        for i, (o, n) in enumerate(zip(offsets, lengths, strict=True))
    )


def _example(batch: int, randn) -> dict:
    return {
        "key": Key(seed=3, samples=tuple(range(batch))),
        "noise": randn(batch, 6, 4, 2, 2),
        "initial_latents": randn(batch, 1, 4, 2, 2),
        "steps": (1000.0, 750.0, 500.0, 250.0),
        "shift": 5.0,
    }


def _check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    yield from block_problems(options, frames)
    yield from shift_problems(options)
    try:
        step_list(options["steps"], options["shift"] if options["shift"] > 0 else 1.0, options["warp"])
    except ShapeError as error:
        yield "steps", str(error)


def _rollout_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    yield from _check(options, frames)
    for name in ("grad_frames", "output_frames"):
        found = options[name]
        if found is not None and found < options["frames_per_block"]:
            yield (
                name,
                f"the last {found} frames hold no whole block of {options['frames_per_block']}, so nothing carries gradient",
            )


@transform(
    out=("blocks", "given_blocks", "exit_from", "exit_to", "gradient_mask"),
    kind="keyed",
    example=_example,
    check=_rollout_check,
    gradient=("grad_frames",),
)
def plan_rollout(
    key: Key,
    noise: Tensor,
    initial_latents: Tensor | None = None,
    *,
    steps: Sequence[float],
    shift: float = 1.0,
    warp: bool = True,
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
    same_step_across_blocks: bool = True,
    last_step_only: bool = False,
    grad_frames: int | None = None,
    output_frames: int | None = None,
    name: str = "exit",
):
    """Plans a self-forcing rollout.

    Args:
        key: draws the exit steps, the same for all samples and ranks.
        noise: [B, F, C, H, W]; only its shape and device are used.
        initial_latents: [B, F0, C, H, W], frames that the rollout continues.
        steps: timesteps from 1000 downwards; a trailing 0 is dropped.
        shift, warp: with `warp` the list is moved to the shifted axis, see `warp_steps`.
        frames_per_block: frames that are denoised together.
        independent_first_frame: the first frame is a block of its own.
        same_step_across_blocks: one exit step for all blocks, else one drawn for each.
        last_step_only: every block goes through all steps (inference).
        grad_frames: only blocks that start within the last so many frames carry gradient; None is all.
        output_frames: how many of the last frames are judged (see `join_blocks`); None is all. Only they can carry gradient.
        name: tells draws of one step apart.

    Returns:
        blocks: tuple of `Block`, generated ones. given_blocks: those of the initial latents.
        exit_from, exit_to: unshifted timesteps of the exit step and of the one after it (0 after the last), for
        `draw_timestep`; None when blocks exit at different steps.
        gradient_mask: [B, F0 + F] bool (the last `output_frames` of it), generated frames that carry gradient.

    Raises:
        ShapeError: frames do not divide into blocks, or steps do not descend.

    Source: Self-Forcing, arXiv 2506.08009, algorithm 1.

    Example:
        >>> import torch
        >>> plan = plan_rollout(Key(seed=0), torch.zeros(1, 6, 4, 2, 2), steps=[1000, 500], last_step_only=True)
        >>> [(b.positions, [s.timestep for s in b.lead], b.exit.timestep) for b in plan[0]]
        [((0, 1, 2), [1000.0], 500.0), ((3, 4, 5), [1000.0], 500.0)]
    """
    entries, raw = step_list(steps, shift, warp)
    plain, given_blocks = plan_blocks(
        noise, initial_latents, frames_per_block=frames_per_block, independent_first_frame=independent_first_frame
    )
    given = 0 if initial_latents is None else initial_latents.shape[1]
    total = given + noise.shape[1]
    kept = total if output_frames is None else min(output_frames, total)
    grad_from = max(total - kept, 0 if grad_frames is None else total - grad_frames)
    if last_step_only:
        exits = (len(entries) - 1,) * len(plain)
    else:
        exits = key.integers(name, 0, len(entries), 1 if same_step_across_blocks else len(plain))
        exits = exits * len(plain) if same_step_across_blocks else exits
    blocks = tuple(
        dataclasses.replace(block, lead=entries[:leave], exit=entries[leave], grad=block.start >= grad_from)
        for block, leave in zip(plain, exits, strict=True)
    )
    same = same_step_across_blocks or last_step_only
    exit_from = raw[exits[0]] if same else None
    exit_to = (raw[exits[0] + 1] if exits[0] + 1 < len(raw) else 0.0) if same else None
    flags = [False] * given + [block.grad for block in blocks for _ in range(block.frames)]
    gradient_mask = on_device(flags[total - kept :], noise.device).expand(noise.shape[0], -1)
    return blocks, given_blocks, exit_from, exit_to, gradient_mask


def _few_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    return _check({**options, "frames_per_block": None}, frames)


@transform(
    out=("lead", "step"), kind="host", example=lambda batch, randn: {"steps": (1000.0, 500.0), "shift": 5.0}, check=_few_check
)
def plan_few_steps(*, steps: Sequence[float], shift: float = 1.0, warp: bool = True):
    """The steps of a few-step sampler that denoises all frames together.

    Args:
        steps, shift, warp: see `plan_rollout`.

    Returns:
        lead: tuple of `Step`, those that are followed by a re-noising. step: the last one.

    Raises:
        ShapeError: steps do not descend.

    Example:
        >>> lead, step = plan_few_steps(steps=[1000, 500])
        >>> [one.timestep for one in lead], step.timestep
        ([1000.0], 500.0)
    """
    entries, _ = step_list(steps, shift, warp)
    return entries[:-1], entries[-1]


def step_list(steps: Sequence[float], shift: float, warp: bool) -> tuple[tuple[Step, ...], tuple[float, ...]]:
    """The entries of a step list without its trailing 0, and the same timesteps on the unshifted axis.

    Raises:
        ShapeError: steps do not descend.

    Example:
        >>> entries, raw = step_list([1000, 500, 0], 5.0, True)
        >>> [round(entry.timestep, 1) for entry in entries], raw
        ([1000.0, 833.3], (1000.0, 500.0))
    """
    check_steps(steps)
    kept = tuple(steps[:-1]) if steps[-1] == 0 else tuple(steps)
    if not kept:
        raise ShapeError("the step list holds only 0; expected timesteps from 1000 downwards, such as [1000, 750, 500, 250]")
    warped = warp_steps(kept, shift, warp)
    raw = tuple(float(t) if warp else TIMESTEPS * unshift_sigma(t / TIMESTEPS, shift) for t in kept)
    following = (*warped[1:], None)
    entries = tuple(Step(index=i, timestep=t, next_timestep=n) for i, (t, n) in enumerate(zip(warped, following, strict=True)))
    return entries, raw
