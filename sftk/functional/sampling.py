"""Keyed draws as transforms: noise, score timesteps, lengths, dropped conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sftk.core.geometry import block_problems, split_blocks
from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional.host import on_device
from sftk.functional.keys import Key, normal_like, uniform_like
from sftk.functional.schedule import TIMESTEPS, shift_problems, shift_sigma

Per = Literal["sample", "block", "frame"]


def _noise_example(batch: int, randn) -> dict:
    return {"key": Key(seed=3, samples=tuple(range(batch))), "like": randn(batch, 3, 4, 2, 2), "name": "score_noise"}


@transform(out="noise", kind="keyed", example=_noise_example)
def draw_noise(key: Key, like: Tensor, *, name: str = "noise"):
    """Standard normal noise of another tensor's shape, device and dtype.

    Args:
        key: where the numbers come from.
        like: [B, ...].
        name: tells draws of one step apart.

    Returns:
        noise: [B, ...].

    Example:
        >>> draw_noise(Key(seed=0, samples=(0, 1)), torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    return normal_like(key, name, like)


def shape_timestep(raw: Tensor, shift: float, clamp: tuple[float, float] | None = None) -> Tensor:
    """Uniform timesteps, shifted once and clamped: `1000 shift(raw / 1000)`.

    Args:
        raw: any shape, in [0, 1000].
        shift: see `shift_sigma`; 1 leaves them as they are.
        clamp: lowest and highest timestep.

    Example:
        >>> shape_timestep(torch.tensor([1.0, 500.0, 999.9]), 5.0, (20, 980))
        tensor([ 20.0000, 833.3333, 980.0000])
    """
    timestep = shift_sigma(raw / TIMESTEPS, shift) * TIMESTEPS
    return timestep if clamp is None else timestep.clamp(*clamp)


def spread_blocks(values: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Gives every frame of a block the value of the block's first frame.

    Args:
        values: [B, F].
        blocks: lengths of the blocks, which sum to F.

    Example:
        >>> spread_blocks(torch.arange(7)[None], (1, 3, 3))
        tensor([[0, 1, 1, 1, 4, 4, 4]])
    """
    starts = [sum(blocks[:i]) for i in range(len(blocks))]
    index = on_device([start for start, n in zip(starts, blocks, strict=True) for _ in range(n)], values.device)
    return values[:, index]


def _timestep_example(batch: int, randn) -> dict:
    return {
        "key": Key(seed=3, samples=tuple(range(batch))),
        "like": randn(batch, 6, 4, 2, 2),
        "shift": 5.0,
        "clamp": (20.0, 980.0),
        "per": "block",
    }


def _timestep_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    yield from block_problems(options, frames)
    if options["clamp"] is not None and not 0 <= options["clamp"][0] <= options["clamp"][1] <= TIMESTEPS:
        yield "clamp", f"expected [low, high] with 0 <= low <= high <= {TIMESTEPS}, found {list(options['clamp'])}"
    yield from shift_problems(options)
    if not 0 <= options["low"] <= options["high"] <= TIMESTEPS:
        yield "low", f"expected 0 <= low <= high <= {TIMESTEPS}, found low {options['low']} and high {options['high']}"


@transform(out="timestep", kind="keyed", example=_timestep_example, check=_timestep_check)
def draw_timestep(
    key: Key,
    like: Tensor,
    exit_from: float | None = None,
    exit_to: float | None = None,
    *,
    shift: float = 1.0,
    clamp: tuple[float, float] | None = None,
    per: Per = "sample",
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
    low: float = 0.0,
    high: float = 1000.0,
    ts_schedule: bool = False,
    ts_schedule_max: bool = False,
    name: str = "timestep",
):
    """Timesteps at which scores are compared: uniform in [low, high), shifted once, clamped.

    Args:
        key: where the numbers come from.
        like: [B, F, ...].
        exit_from, exit_to: unshifted timesteps of the rollout's exit step and of the step after it, from `plan_rollout`.
        shift: of the score models' time axis.
        clamp: lowest and highest result; [20, 980] is usual.
        per: one value for each sample, block or frame.
        frames_per_block, independent_first_frame: the blocks, for `per: block`.
        ts_schedule: draw above `exit_to` only (at least as noisy as what the rollout left).
        ts_schedule_max: draw below `exit_from` only.
        name: tells draws of one step apart.

    Returns:
        timestep: [B, F] float32, in [0, 1000].

    Raises:
        ShapeError: `ts_schedule` or `ts_schedule_max` without an exit step that all blocks share.

    Source: Self-Forcing, arXiv 2506.08009, algorithm 1; DMD2, arXiv 2405.14867.

    Example:
        >>> t = draw_timestep(Key(seed=0, samples=(0, 1)), torch.zeros(2, 6, 1), per="sample")
        >>> t.shape, bool((t == t[:, :1]).all())
        (torch.Size([2, 6]), True)
    """
    if ts_schedule:
        low = _shared(exit_to)
    if ts_schedule_max:
        high = _shared(exit_from)
    frames = like.shape[1]
    u = uniform_like(key, name, like, (1 if per == "sample" else frames,))
    raw = low + (high - low) * u
    if per == "sample":
        raw = raw.expand(-1, frames)
    elif per == "block":
        raw = spread_blocks(raw, split_blocks(frames, frames_per_block, independent_first_frame))
    return shape_timestep(raw, shift, clamp)


def _shared(exit_time: float | None) -> float:
    if exit_time is None:
        raise ShapeError(
            "ts_schedule and ts_schedule_max need the exit step that all blocks of a rollout share; found none: set "
            "same_step_across_blocks: true, or leave them false where samples come from no rollout"
        )
    return exit_time


def _length_example(batch: int, randn) -> dict:
    return {"key": Key(seed=3, samples=tuple(range(batch))), "noise": randn(batch, 9, 4, 2, 2), "min_frames": 3}


def _length_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["min_frames"] is not None:
        for name, message in block_problems(options, options["min_frames"]):
            yield ("min_frames" if options["frames_per_block"] >= 1 else name), message
        if frames is not None and options["min_frames"] > frames:
            yield "min_frames", f"{options['min_frames']} is more than the {frames} frames that there are"


@transform(out="cropped", kind="keyed", example=_length_example, check=_length_check)
def crop_length(
    key: Key,
    noise: Tensor,
    *,
    min_frames: int | None = None,
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
    name: str = "length",
):
    """The first frames of the noise, their number drawn: training on rollouts of random length.

    Args:
        key: where the number comes from; all samples and ranks share it.
        noise: [B, F, C, H, W], of the longest length.
        min_frames: the shortest length; None keeps every frame.
        frames_per_block, independent_first_frame: lengths are whole blocks.
        name: tells draws of one step apart.

    Returns:
        cropped: [B, F', C, H, W].

    Raises:
        ShapeError: F or `min_frames` is not a whole number of blocks, or F is below `min_frames`.

    Example:
        >>> crop_length(Key(seed=0), torch.zeros(1, 9, 1), min_frames=3).shape[1] in (3, 6, 9)
        True
    """
    if min_frames is None:
        return noise
    blocks = split_blocks(noise.shape[1], frames_per_block, independent_first_frame)
    least = len(split_blocks(min_frames, frames_per_block, independent_first_frame))
    if least > len(blocks):
        raise ShapeError(f"min_frames {min_frames} is more than the {noise.shape[1]} frames that there are")
    (count,) = key.integers(name, least, len(blocks) + 1, 1)
    return noise[:, : sum(blocks[:count])]


def _drop_example(batch: int, randn) -> dict:
    key = Key(seed=3, samples=tuple(range(batch)))
    return {"key": key, "prompt_embeds": randn(batch, 4, 8), "negative_embeds": randn(batch, 4, 8), "rate": 0.5}


def _drop_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if not 0 <= options["rate"] <= 1:
        yield "rate", f"a rate lies in [0, 1], found {options['rate']}"


@transform(out="dropped_embeds", kind="keyed", example=_drop_example, check=_drop_check)
def drop_condition(key: Key, prompt_embeds: Tensor, negative_embeds: Tensor, *, rate: float = 0.1, name: str = "drop"):
    """Replaces the prompt of a share of the samples by the negative one, so that guidance can be used later.

    Args:
        prompt_embeds, negative_embeds: [B, L, D].
        rate: share of samples, in [0, 1].
        name: tells draws of one step apart.

    Returns:
        dropped_embeds: [B, L, D].

    Source: classifier-free guidance, arXiv 2207.12598, algorithm 1.

    Example:
        >>> drop_condition(Key(seed=0), torch.ones(1, 1, 1), torch.zeros(1, 1, 1), rate=1.0)
        tensor([[[0.]]])
    """
    drop = uniform_like(key, name, prompt_embeds, (1, 1)) < rate
    return torch.where(drop, negative_embeds, prompt_embeds)
