"""The context of a rollout: an empty cache, what a block sees of it, what a finished or given block adds to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional import cache as caches
from sftk.functional.cache import KVCache, LayerKV, RopeMode
from sftk.functional.examples import example_block, example_cache, step_example
from sftk.functional.guided import guided_kv
from sftk.functional.keys import Key, normal_like
from sftk.functional.noise import interpolate
from sftk.functional.packed import Storage
from sftk.functional.plan import Block
from sftk.functional.predict import Denoiser, toy_denoiser
from sftk.functional.schedule import TIMESTEPS, ScheduleName, frame_timesteps, timestep_to_sigma

ContextGradient = Literal["detach", "straight_through"]


def _window_example(batch: int, randn) -> dict:
    return {"cache": example_cache(batch, randn), "block": example_block(), "window": 5, "sink": 1}


def _commit_example(batch: int, randn) -> dict:
    example = step_example(batch, randn)
    return {
        "denoiser": toy_denoiser,
        "x0": example["noisy"],
        "cache": example["cache"],
        "key": Key(seed=3, samples=tuple(range(batch))),
        "block": example_block(),
        "prompt_embeds": example["prompt_embeds"],
        "context_noise": 100.0,
    }


def _given_example(batch: int, randn) -> dict:
    example = step_example(batch, randn)
    return {
        "denoiser": toy_denoiser,
        "cache": example["cache"],
        "block": example_block(),
        "prompt_embeds": example["prompt_embeds"],
        "initial_latents": randn(batch, 6, 4, 2, 2),
    }


@transform(out="cache", kind="host", example=lambda batch, randn: {"rope": "relative", "blocks": (example_block(),)})
def start_cache(
    blocks: Sequence[Block] | None = None,
    given_blocks: Sequence[Block] | None = None,
    *,
    rope: RopeMode = "absolute",
    kv_cache: Storage = "full",
    window: int | None = None,
    max_context_frames: int | None = None,
):
    """An empty cache, with room for all blocks where nothing will be dropped, up to `MOST_RESERVED` frames of context.

    Args:
        blocks, given_blocks: what will be appended. The last of `blocks` need not be, but its passes write, see `free_space`.
        rope: how keys remember their position, see `KVCache`.
        kv_cache: how keys and values are kept; `fp8` and `int8` halve the memory of bf16 ones.
        window, max_context_frames: of `window_context`; what is dropped needs no room.

    Example:
        >>> start_cache().frames, start_cache((example_block(), example_block())).reserve
        (0, 6)
    """
    context = sum(block.frames for block in (*(given_blocks or ()), *(blocks or ())[:-1]))
    last = sum(block.frames for block in (blocks or ())[-1:])
    whole = max_context_frames is None and (window is None or window >= context + last) and context <= MOST_RESERVED
    own = last if (rope, kv_cache) == ("absolute", "full") else 0  # others have to be rotated or unpacked into a copy
    return KVCache(rope=rope, storage=kv_cache, reserve=context + own if whole and context else 0)


MOST_RESERVED = 96
"""Frames of context for which a cache makes room at once. What is longer is a stream, which may end early."""


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
    elif options["max_context_frames"] == 0 and options["keep_first_frame"]:
        yield "keep_first_frame", "a context of 0 frames cannot keep the first one; raise max_context_frames"


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
        ShapeError: the window cannot hold the block and the sink, or a context of 0 frames should keep the first.

    Example:
        >>> window_context(example_cache(1, torch.randn), example_block(), window=5, sink=1).positions
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
        cache = caches.window(cache, size=max_context_frames, sink=int(keep_first_frame))
    return cache


def _commit_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if not 0 <= options["context_noise"] <= TIMESTEPS:
        yield "context_noise", f"a timestep lies in [0, {TIMESTEPS}], found {options['context_noise']}"


@transform(
    out="cache",
    kind="keyed",
    models=("denoiser",),
    example=_commit_example,
    check=_commit_check,
    gradient=("context_gradient",),
)
def commit_context(
    denoiser: Denoiser,
    x0: Tensor,
    cache: KVCache,
    key: Key,
    block: Block,
    prompt_embeds: Tensor,
    kv: Sequence[LayerKV] | None = None,
    negative_embeds: Tensor | None = None,
    *,
    scale: float = 1.0,
    batched: bool = False,
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
        negative_embeds: [B, L, D]; with a `scale` other than 1 the cache then holds 2 B samples: the context as guidance's
            conditional passes see it, then as the unconditional ones do.
        scale, batched: of the guidance, as `predict_step` takes them.
        context_noise: timestep of the context, told to the network.
        noise_context: noise the context to that level (False tells the network only, as the public inference does).
        context_gradient: `detach` cuts gradient between blocks; `straight_through` delivers what later blocks send to the
            cached keys and values to those of the exit step.
        commit_last: commit the last block too (to go on from its cache).
        schedule, shift: sigma of `context_noise`; on the `table` schedule timestep 0 still noises a little.

    Returns:
        cache: a new cache, one block longer.

    Raises:
        ShapeError: `straight_through` has no kv, or guidance no negative_embeds.

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
            noise = normal_like(key, f"context_noise_b{block.index}", x0)
            level = frame_timesteps(x0, context_noise)
            context = interpolate(context, noise, timestep_to_sigma(level, schedule, shift))
        guidance: Any = {"scale": scale, "batched": batched}
        found = _context_kv(denoiser, context, context_noise, cache, block, prompt_embeds, negative_embeds, guidance)
    if context_gradient == "straight_through":
        if kv is None:
            raise ShapeError("context_gradient: straight_through needs kv, what the exit step returned for these frames")
        found = caches.straight_through(found, kv)
    return caches.append(cache, found, block.positions)


@transform(out="cache", kind="per_sample", models=("denoiser",), example=_given_example)
def commit_given(
    denoiser: Denoiser,
    cache: KVCache,
    block: Block,
    prompt_embeds: Tensor,
    initial_latents: Tensor | None = None,
    negative_embeds: Tensor | None = None,
    *,
    scale: float = 1.0,
    batched: bool = False,
):
    """Appends the keys and values of a block of given latents, run once at timestep 0 without noise or gradient.

    Args:
        initial_latents: [B, F0, C, H, W].
        negative_embeds, scale, batched: see `commit_context`.

    Returns:
        cache: a new cache, one block longer.

    Example:
        >>> commit_given(**_given_example(1, torch.randn)).frames
        6
    """
    assert initial_latents is not None, "given blocks are planned from the initial latents"
    with torch.no_grad():
        latents = initial_latents[:, block.offset : block.offset + block.frames]
        guidance: Any = {"scale": scale, "batched": batched}
        found = _context_kv(denoiser, latents, 0.0, cache, block, prompt_embeds, negative_embeds, guidance)
        return caches.append(cache, found, block.positions)


def _context_kv(
    denoiser: Denoiser,
    latents: Tensor,
    timestep: float,
    cache: KVCache,
    block: Block,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    guidance: Mapping[str, Any],
) -> Sequence[LayerKV]:
    times, positions = frame_timesteps(latents, timestep), block.positions
    return guided_kv(denoiser, latents, times, prompt_embeds, negative_embeds, cache=cache, positions=positions, **guidance)
