"""Arguments that the examples of the rollout's transforms share."""

from __future__ import annotations

import torch

from sftk.functional import cache as caches
from sftk.functional.cache import KVCache
from sftk.functional.plan import Block, Step
from sftk.functional.predict import toy_denoiser


def example_block() -> Block:
    """The second block of a rollout: three frames, one step before the exit step."""
    lead = (Step(index=0, timestep=1000.0, next_timestep=500.0),)
    return Block(index=1, start=3, frames=3, offset=3, lead=lead, exit=Step(index=1, timestep=500.0))


def example_cache(batch: int, randn) -> KVCache:
    """A cache that holds the three frames before `example_block`."""
    _, kv, _ = toy_denoiser(randn(batch, 3, 4, 2, 2), torch.zeros(batch, 3), randn(batch, 2, 8))
    return caches.append(KVCache(), kv, (0, 1, 2))


def step_example(batch: int, randn) -> dict:
    """Arguments of `denoise_step`."""
    return {
        "denoiser": toy_denoiser,
        "noisy": randn(batch, 3, 4, 2, 2),
        "step": example_block().lead[0],
        "block": example_block(),
        "cache": example_cache(batch, randn),
        "prompt_embeds": randn(batch, 2, 8),
    }
