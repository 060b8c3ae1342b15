"""The self-forcing rollout's parts: one denoising step, one re-noising, one context commit, each a transform.

`specs/rollout.yaml` folds them over blocks and steps. Nothing here loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional import cache as caches
from sftk.functional.cache import KVCache, LayerKV, RopeMode
from sftk.functional.keys import Key
from sftk.functional.noise import flow_to_x0, interpolate
from sftk.functional.plan import Block, Step
from sftk.functional.predict import Denoiser, toy_denoiser
from sftk.functional.schedule import ScheduleName, timestep_to_sigma

ContextGradient = Literal["detach", "straight_through"]


def _block() -> Block:
    lead = (Step(index=0, timestep=1000.0, next_timestep=500.0),)
    return Block(index=1, start=3, frames=3, offset=3, lead=lead, exit=Step(index=1, timestep=500.0))


def _cache(batch: int, randn) -> KVCache:
    _, kv, _ = toy_denoiser(randn(batch, 3, 4, 2, 2), torch.zeros(batch, 3), randn(batch, 2, 8))
    return caches.append(KVCache(), kv, (0, 1, 2))


def _step_example(batch: int, randn) -> dict:
    return {
        "denoiser": toy_denoiser,
        "noisy": randn(batch, 3, 4, 2, 2),
        "step": _block().lead[0],
        "block": _block(),
        "cache": _cache(batch, randn),
        "prompt_embeds": randn(batch, 2, 8),
    }


def _exit_example(batch: int, randn) -> dict:
    return {key: value for key, value in _step_example(batch, randn).items() if key != "step"}


def _renoise_example(batch: int, randn) -> dict:
    key = Key(seed=3, samples=tuple(range(batch)))
    return {"x0": randn(batch, 3, 4, 2, 2), "key": key, "step": _block().lead[0], "block": _block()}


def _commit_example(batch: int, randn) -> dict:
    example = _step_example(batch, randn)
    return {
        "denoiser": toy_denoiser,
        "x0": example["noisy"],
        "cache": example["cache"],
        "key": Key(seed=3, samples=tuple(range(batch))),
        "block": _block(),
        "prompt_embeds": example["prompt_embeds"],
        "context_noise": 100.0,
    }


def _given_example(batch: int, randn) -> dict:
    example = _step_example(batch, randn)
    return {
        "denoiser": toy_denoiser,
        "cache": example["cache"],
        "block": _block(),
        "prompt_embeds": example["prompt_embeds"],
        "initial_latents": randn(batch, 6, 4, 2, 2),
    }


def _window_example(batch: int, randn) -> dict:
    return {"cache": _cache(batch, randn), "block": _block(), "window": 5, "sink": 1}


@transform(out="cache", kind="host", example=lambda batch, randn: {"rope": "relative"})
def start_cache(*, rope: RopeMode = "absolute"):
    """An empty cache.

    Args:
        rope: how keys remember their position, see `KVCache`.

    Example:
        >>> start_cache().frames
        0
    """
    return KVCache(rope=rope)


@transform(
    out=("noisy", "lead"),
    kind="per_sample",
    example=lambda batch, randn: {"noise": randn(batch, 6, 4, 2, 2), "block": _block()},
)
def begin_block(noise: Tensor, block: Block):
    """A block's slice of the initial noise, and the steps that it goes through before its exit step.

    Args:
        noise: [B, F, C, H, W] of the whole rollout.

    Returns:
        noisy: [B, block.frames, C, H, W]. lead: tuple of `Step`.

    Example:
        >>> noisy, lead = begin_block(torch.zeros(1, 6, 4, 2, 2), _block())
        >>> noisy.shape, len(lead)
        (torch.Size([1, 3, 4, 2, 2]), 1)
    """
    return noise[:, block.offset : block.offset + block.frames], block.lead


def _window_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["sink"] < 0:
        yield "sink", f"a sink has 0 frames or more, found {options['sink']}"
    if options["window"] is not None and options["window"] <= (options["sink"] if options["attend_sink"] else 0):
        yield (
            "window",
            f"a window of {options['window']} frames cannot hold a block and {options['sink']} sink frames; make it larger",
        )
    if options["max_context_frames"] is not None and options["max_context_frames"] < 0:
        yield "max_context_frames", f"a context has 0 frames or more, found {options['max_context_frames']}"


@transform(out="cache", kind="per_sample", example=_window_example, check=_window_check)
def window_context(
    cache: KVCache,
    block: Block,
    *,
    window: int | None = None,
    sink: int = 0,
    attend_sink: bool = True,
    max_context_frames: int | None = None,
    keep_first_frame: bool = False,
):
    """Drops the cached frames that a block does not see.

    Args:
        window: frames that attention spans, the block's own among them; None is all.
        sink: first frames that are never dropped, counted in the window.
        attend_sink: False ignores the sink (what the public code does in training).
        max_context_frames: most frames of context, without the block's own.
        keep_first_frame: the first frame is among them.

    Returns:
        cache: a new cache.

    Raises:
        ShapeError: the window cannot hold the block and the sink.

    Example:
        >>> window_context(_cache(1, torch.randn), _block(), window=5, sink=1).positions
        (0, 2)
    """
    if window is not None:
        sink = sink if attend_sink else 0
        if window < sink + block.frames:
            raise ShapeError(
                f"a window of {window} frames cannot hold a block of {block.frames} and {sink} sink frames; make it larger"
            )
        cache = caches.window(cache, size=window - block.frames, sink=sink)
    if max_context_frames is not None:
        cache = caches.window(cache, size=max_context_frames, sink=min(int(keep_first_frame), max_context_frames))
    return cache


@transform(out=("x0", "kv"), kind="per_sample", models=("denoiser",), example=_step_example)
def denoise_step(
    denoiser: Denoiser,
    noisy: Tensor,
    step: Step,
    block: Block,
    cache: KVCache,
    prompt_embeds: Tensor,
    *,
    schedule: ScheduleName = "continuous",
    shift: float = 1.0,
):
    """One denoising step of one block, given the frames in the cache.

    Args:
        noisy: [B, block.frames, C, H, W] at the step's timestep.
        step: the timestep, told to the network.
        cache: the context; not changed.
        prompt_embeds: [B, L, D].
        schedule, shift: how the timestep becomes the sigma with which the flow is read.

    Returns:
        x0: [B, block.frames, C, H, W]. kv: keys and values of the block, for `commit_context`.

    Example:
        >>> x0, kv = denoise_step(**_step_example(1, torch.randn))
        >>> x0.shape
        torch.Size([1, 3, 4, 2, 2])
    """
    timestep = torch.full(
        noisy.shape[:2], step.timestep, device=noisy.device, dtype=torch.promote_types(noisy.dtype, torch.float32)
    )
    flow, kv, _ = denoiser(noisy, timestep, prompt_embeds, cache=cache, positions=block.positions)
    return flow_to_x0(noisy, flow, timestep_to_sigma(timestep, schedule, shift)), kv


@transform(out=("x0", "kv"), kind="per_sample", models=("denoiser",), example=_exit_example)
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
        return denoise_step(denoiser, noisy, block.exit, block, cache, prompt_embeds, schedule=schedule, shift=shift)


@transform(out="noisy", kind="keyed", example=_renoise_example)
def renoise(x0: Tensor, key: Key, step: Step, block: Block, *, schedule: ScheduleName = "continuous", shift: float = 1.0):
    """Noises a step's x0 to the level of the next step, with fresh noise `renoise_b<block>_s<step>`.

    Args:
        x0: [B, block.frames, C, H, W].
        step: its `next_timestep` is the level.
        schedule, shift: how that timestep becomes a sigma, see `timestep_to_sigma`.

    Returns:
        noisy: [B, block.frames, C, H, W].

    Source: consistency sampling, arXiv 2303.01469, algorithm 1, on the flow-matching path.

    Example:
        >>> renoise(**_renoise_example(1, torch.randn)).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    assert step.next_timestep is not None, "the last step is never followed by a re-noising"
    noise = key.normal(f"renoise_b{block.index}_s{step.index}", x0.shape[1:], device=x0.device, dtype=x0.dtype)
    timestep = torch.full(
        x0.shape[:2], step.next_timestep, device=x0.device, dtype=torch.promote_types(x0.dtype, torch.float32)
    )
    return interpolate(x0, noise, timestep_to_sigma(timestep, schedule, shift))


@transform(out="cache", kind="keyed", models=("denoiser",), example=_commit_example)
def commit_context(
    denoiser: Denoiser,
    x0: Tensor,
    cache: KVCache,
    key: Key,
    block: Block,
    prompt_embeds: Tensor,
    kv: tuple[LayerKV, ...] | None = None,
    *,
    context_noise: float = 0.0,
    noise_context: bool = True,
    context_gradient: ContextGradient = "detach",
    commit_last: bool = False,
    schedule: ScheduleName = "continuous",
    shift: float = 1.0,
):
    """Runs a finished block once more, clean or slightly noised and without gradient, and appends its keys and values.

    Args:
        x0: [B, block.frames, C, H, W], the block's output.
        cache: not changed.
        kv: what the exit step returned; `straight_through` needs it.
        context_noise: timestep of the context, told to the network.
        noise_context: noise the context to that level (False tells the network only, as the public inference does).
        context_gradient: `detach` cuts gradient between blocks; `straight_through` delivers what later blocks send to the
            cached keys and values to those of the exit step.
        commit_last: commit the last block too (to go on from its cache).
        schedule, shift: sigma of `context_noise`; on the `table` schedule timestep 0 still noises a little.

    Returns:
        cache: a new cache, one block longer.

    Source: Self-Forcing, arXiv 2506.08009, algorithm 1, line 13.

    Example:
        >>> commit_context(**_commit_example(1, torch.randn)).positions
        (0, 1, 2, 3, 4, 5)
    """
    if block.last and not commit_last:
        return cache
    with torch.no_grad():
        context = x0.detach()
        if noise_context and (context_noise > 0 or schedule == "table"):
            noise = key.normal(f"context_noise_b{block.index}", x0.shape[1:], device=x0.device, dtype=x0.dtype)
            level = torch.full(
                x0.shape[:2], context_noise, device=x0.device, dtype=torch.promote_types(x0.dtype, torch.float32)
            )
            context = interpolate(context, noise, timestep_to_sigma(level, schedule, shift))
        found = _context_kv(denoiser, context, context_noise, cache, block, prompt_embeds)
    if context_gradient == "straight_through" and kv is not None:
        found = caches.straight_through(found, kv)
    return caches.append(cache, found, block.positions)


@transform(out="cache", kind="per_sample", models=("denoiser",), example=_given_example)
def commit_given(
    denoiser: Denoiser, cache: KVCache, block: Block, prompt_embeds: Tensor, initial_latents: Tensor | None = None
):
    """Appends the keys and values of a block of given latents, run once at timestep 0 without noise or gradient.

    Args:
        initial_latents: [B, F0, C, H, W].

    Returns:
        cache: a new cache, one block longer.

    Example:
        >>> commit_given(**_given_example(1, torch.randn)).frames
        6
    """
    assert initial_latents is not None, "given blocks are planned from the initial latents"
    with torch.no_grad():
        latents = initial_latents[:, block.offset : block.offset + block.frames]
        return caches.append(cache, _context_kv(denoiser, latents, 0.0, cache, block, prompt_embeds), block.positions)


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
    joined = torch.cat([*(() if initial_latents is None else (initial_latents,)), *x0_blocks], dim=1)
    return joined if output_frames is None else joined[:, -output_frames:]


def _context_kv(denoiser: Denoiser, latents: Tensor, timestep: float, cache: KVCache, block: Block, prompt_embeds: Tensor):
    times = torch.full(
        latents.shape[:2], timestep, device=latents.device, dtype=torch.promote_types(latents.dtype, torch.float32)
    )
    return denoiser(latents, times, prompt_embeds, cache=cache, positions=block.positions)[1]
