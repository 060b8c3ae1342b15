"""Whether both passes of guidance fit into one call: an estimate from sizes, compared with the memory that is free."""

from __future__ import annotations

import torch

from sftk.models.config import WanConfig
from sftk.spec.sampling import AnySampling, is_causal

SHARE = 0.7
"""Of the free memory that the estimate may take; the decoder and the allocator need the rest."""


def pass_bytes(config: WanConfig, *, batch: int, tokens: int, context: int, itemsize: int, causal: bool) -> int:
    """Bytes that sampling needs besides the weights, with both passes in one call: an upper estimate.

    Args:
        batch: videos.
        tokens: of one video in one call.
        context: tokens of one video in the cache.
        itemsize: bytes of a number in the model's precision.
        causal: keys and values are cached.

    Example:
        >>> from sftk.models.config import preset
        >>> sizes = {"tokens": 4680, "context": 28080, "itemsize": 2, "causal": True}
        >>> round(pass_bytes(preset("1.3b"), batch=1, **sizes) / 1e9, 1)
        13.7
    """
    # The feed-forward before and after its activation; hidden states, queries, keys, values, and what attention gives.
    layer = tokens * itemsize * (2 * config.ffn_dim + 8 * config.dim)
    modulated = tokens * 4 * 4 * config.dim  # in float32
    joined = 2 * 2 * (tokens + context) * config.dim * itemsize  # one layer's keys and values, before and after rotation
    kept = 2 * config.num_layers * config.dim * itemsize * (tokens + context) if causal else 0
    return 2 * batch * (layer + modulated + joined + kept)


def guidance_fits(
    sampling: AnySampling, config: WanConfig, shape: tuple[int, int, int, int], *, batch: int, itemsize: int, free: int
) -> bool:
    """Whether `guidance_batch: auto` makes both passes in one call.

    Args:
        shape: frames, channels, height and width of the latents, given frames among them.
        free: bytes.

    Example:
        >>> from sftk.models.config import preset
        >>> from sftk.spec.sampling import TeacherSampling
        >>> shape = (21, 16, 60, 104)
        >>> [guidance_fits(TeacherSampling(), preset("14b"), shape, batch=1, itemsize=2, free=gb * 10**9) for gb in (4, 40)]
        [False, True]
    """
    frames = shape[0]
    per_frame = (shape[2] // config.patch_size[1]) * (shape[3] // config.patch_size[2])
    causal = is_causal(sampling)
    block = min(getattr(sampling, "frames_per_block", frames), frames)
    seen = min(getattr(sampling, "window", None) or frames, frames) if causal else frames
    tokens, context = block * per_frame, (seen - block) * per_frame
    needed = pass_bytes(config, batch=batch, tokens=tokens, context=context, itemsize=itemsize, causal=causal)
    return needed <= SHARE * free


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a CUDA device; 0 elsewhere, where one batch is no faster.

    Example:
        >>> free_memory(torch.device("cpu"))
        0
    """
    if device.type != "cuda":
        return 0
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable
