"""The denoising steps of a self-forcing rollout, each a transform that `specs/rollout.yaml` folds over blocks and steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.cache import KVCache
from sftk.functional.examples import example_block, step_example
from sftk.functional.keys import Key, normal_like
from sftk.functional.noise import flow_to_x0, interpolate
from sftk.functional.plan import Block, Step
from sftk.functional.predict import Denoiser
from sftk.functional.schedule import ScheduleName, frame_timesteps, timestep_to_sigma


def _exit_example(batch: int, randn) -> dict:
    return {key: value for key, value in step_example(batch, randn).items() if key != "step"}


def _renoise_example(batch: int, randn) -> dict:
    key = Key(seed=3, samples=tuple(range(batch)))
    return {"x0": randn(batch, 3, 4, 2, 2), "key": key, "step": example_block().lead[0], "block": example_block()}


@transform(
    out=("noisy", "lead"),
    kind="per_sample",
    example=lambda batch, randn: {"noise": randn(batch, 6, 4, 2, 2), "block": example_block()},
)
def begin_block(noise: Tensor, block: Block):
    """A block's slice of the initial noise, and the steps that it goes through before its exit step.

    Args:
        noise: [B, F, C, H, W] of the whole rollout, or a `FrameNoise` that stands for it.

    Returns:
        noisy: [B, block.frames, C, H, W]. lead: tuple of `Step`.

    Example:
        >>> noisy, lead = begin_block(torch.zeros(1, 6, 4, 2, 2), example_block())
        >>> noisy.shape, len(lead)
        (torch.Size([1, 3, 4, 2, 2]), 1)
    """
    return noise[:, block.offset : block.offset + block.frames], block.lead


@transform(out=("x0", "kv"), kind="per_sample", models=("denoiser",), example=step_example)
def denoise_step(
    denoiser: Denoiser,
    noisy: Tensor,
    step: Step,
    prompt_embeds: Tensor,
    block: Block | None = None,
    cache: KVCache | None = None,
    *,
    schedule: ScheduleName = "continuous",
    shift: float = 1.0,
):
    """One denoising step of one block, given the frames in the cache, or of all frames of a bidirectional model.

    Args:
        noisy: [B, block.frames, C, H, W] at the step's timestep.
        step: the timestep, told to the network.
        prompt_embeds: [B, L, D].
        block: where its frames stand; None is all of them.
        cache: the context; not changed.
        schedule, shift: how the timestep becomes the sigma with which the flow is read.

    Returns:
        x0: [B, block.frames, C, H, W]. kv: keys and values of the block, for `commit_context`; empty without a cache.

    Example:
        >>> x0, kv = denoise_step(**step_example(1, torch.randn))
        >>> x0.shape
        torch.Size([1, 3, 4, 2, 2])
    """
    timestep = frame_timesteps(noisy, step.timestep)
    positions = None if block is None else block.positions
    flow, kv, _ = denoiser(noisy, timestep, prompt_embeds, cache=cache, positions=positions)
    return flow_to_x0(noisy, flow, timestep_to_sigma(timestep, schedule, shift)), kv


@transform(out=("x0", "kv"), kind="per_sample", models=("denoiser",), example=_exit_example, replay=True)
def exit_step(
    denoiser: Denoiser,
    noisy: Tensor,
    block: Block,
    cache: KVCache,
    prompt_embeds: Tensor,
    *,
    schedule: ScheduleName = "continuous",
    shift: float = 1.0,
):
    """The step at which a block leaves the denoising loop: as `denoise_step`, with gradient where the plan says so.

    Returns:
        x0: [B, block.frames, C, H, W], the block's output. kv: its keys and values.

    Source: stochastic gradient truncation, Self-Forcing, arXiv 2506.08009, algorithm 1, lines 8 to 12.

    Example:
        >>> exit_step(**_exit_example(1, torch.randn))[0].shape
        torch.Size([1, 3, 4, 2, 2])
    """
    assert block.exit is not None, "a generated block has an exit step"
    with torch.set_grad_enabled(torch.is_grad_enabled() and block.grad):
        return denoise_step(denoiser, noisy, block.exit, prompt_embeds, block, cache, schedule=schedule, shift=shift)


@transform(out="noisy", kind="keyed", example=_renoise_example)
def renoise(
    x0: Tensor, key: Key, step: Step, block: Block | None = None, *, schedule: ScheduleName = "continuous", shift: float = 1.0
):
    """Noises a step's x0 to the level of the next step, with fresh noise `renoise_b<block>_s<step>`.

    Args:
        x0: [B, block.frames, C, H, W].
        step: its `next_timestep` is the level.
        block: whose frames they are; None is all of them, as a single block's.
        schedule, shift: how that timestep becomes a sigma, see `timestep_to_sigma`.

    Returns:
        noisy: [B, block.frames, C, H, W].

    Source: consistency sampling, arXiv 2303.01469, algorithm 1, on the flow-matching path.

    Example:
        >>> renoise(**_renoise_example(1, torch.randn)).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    assert step.next_timestep is not None, "the last step is never followed by a re-noising"
    name = f"renoise_b{0 if block is None else block.index}_s{step.index}"
    noise = normal_like(key, name, x0)
    timestep = frame_timesteps(x0, step.next_timestep)
    return interpolate(x0, noise, timestep_to_sigma(timestep, schedule, shift))


def _join_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["output_frames"] is not None and options["output_frames"] < 1:
        yield "output_frames", f"at least 1 frame is judged, found {options['output_frames']}"


@transform(
    out="x0",
    kind="per_sample",
    example=lambda batch, randn: {"x0_blocks": tuple(randn(batch, 3, 4, 2, 2) for _ in range(2))},
    check=_join_check,
)
def join_blocks(x0_blocks: tuple[Tensor, ...], initial_latents: Tensor | None = None, *, output_frames: int | None = None):
    """The blocks of a rollout as one tensor, given frames first, or only its last frames.

    Args:
        x0_blocks: [B, F_i, C, H, W] each.
        initial_latents: [B, F0, C, H, W].
        output_frames: how many of the last frames to return, so that scores judge a window of a longer rollout; None is all.

    Returns:
        x0: [B, F0 + sum F_i, C, H, W], or [B, output_frames, C, H, W].

    Example:
        >>> blocks = (torch.zeros(1, 3, 1), torch.ones(1, 3, 1))
        >>> join_blocks(blocks).shape, join_blocks(blocks, output_frames=3).mean()
        (torch.Size([1, 6, 1]), tensor(1.))
    """
    blocks = [*(() if initial_latents is None else (initial_latents,)), *x0_blocks]
    if output_frames is None:
        return torch.cat(blocks, dim=1)
    # What lies before is left out, not cut off: it would get gradients of zeros, for which a replay runs its step again.
    while sum(block.shape[1] for block in blocks[1:]) >= output_frames:
        del blocks[0]
    return torch.cat(blocks, dim=1)[:, -output_frames:]
