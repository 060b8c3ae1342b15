"""Both passes of classifier-free guidance, one after the other or in one batch; their context stands in one cache.

Under guidance a cache holds 2 B samples: the context as the conditional passes see it, then as the unconditional ones do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sftk.errors import ShapeError
from sftk.functional.cache import KVCache, LayerKV, take_rows
from sftk.functional.guidance import guide
from sftk.functional.predict import Denoiser


def guided_flow(
    denoiser: Denoiser,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    scale: float,
    batched: bool = False,
    cache: KVCache | None = None,
    **more: Any,
) -> Tensor:
    """The flow under guidance.

    Args:
        latents: [B, F, C, H, W]. timestep: [B, F]. prompt_embeds, negative_embeds: [B, L, D].
        scale: see `guide`; 1 makes the conditional pass only.
        batched: both passes in one call of twice the batch.
        cache: of B samples at scale 1, else of 2 B.
        more: further arguments of the model, of B samples.

    Returns:
        flow: [B, F, C, H, W].

    Example:
        >>> from sftk.functional.predict import toy_denoiser
        >>> latents, embeds = torch.ones(1, 3, 4, 2, 2), torch.zeros(1, 2, 8)
        >>> guided_flow(toy_denoiser, latents, torch.zeros(1, 3), embeds, embeds + 1, scale=2.0).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    if scale == 1.0:
        return denoiser(latents, timestep, prompt_embeds, cache=cache, **more)[0]
    passes = _passes(denoiser, latents, timestep, (prompt_embeds, negative_embeds), batched, cache, more)
    cond, uncond = torch.cat([flow for flow, _ in passes]).chunk(2)
    return guide(cond, uncond, scale=scale)


def guided_kv(
    denoiser: Denoiser,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    *,
    scale: float,
    batched: bool = False,
    cache: KVCache,
    **more: Any,
) -> Sequence[LayerKV]:
    """Keys and values of clean latents, as the passes of `guided_flow` will want them in their cache.

    Args:
        latents, timestep, ...: see `guided_flow`.

    Returns:
        kv: of each layer, of B samples at scale 1, else of 2 B.

    Raises:
        ShapeError: guidance has no negative_embeds.

    Example:
        >>> from sftk.functional.predict import toy_denoiser
        >>> latents, embeds = torch.ones(1, 3, 4, 2, 2), torch.zeros(1, 2, 8)
        >>> kv = guided_kv(toy_denoiser, latents, torch.zeros(1, 3), embeds, embeds + 1, scale=2.0, cache=KVCache())
        >>> kv[0][0].shape
        torch.Size([2, 3, 1, 16])
    """
    if scale == 1.0:
        return denoiser(latents, timestep, prompt_embeds, cache=cache, **more)[1]
    if negative_embeds is None:
        raise ShapeError(f"guidance of scale {scale} needs negative_embeds")
    found = [kv for _, kv in _passes(denoiser, latents, timestep, (prompt_embeds, negative_embeds), batched, cache, more)]
    if len(found) == 1:
        return found[0]
    cond, uncond = found
    return tuple(
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]]), torch.cat([a[3], b[3]]))
        for a, b in zip(cond, uncond, strict=True)
    )


def _passes(
    denoiser: Denoiser,
    latents: Tensor,
    timestep: Tensor,
    embeds: tuple[Tensor, Tensor],
    batched: bool,
    cache: KVCache | None,
    more: dict[str, Any],
) -> Iterator[tuple[Tensor, Sequence[LayerKV]]]:
    """Flow, keys and values of each pass; of the only one when both are in one batch."""
    if batched:
        twice: dict[str, Any] = {
            name: torch.cat([value, value]) if isinstance(value, Tensor) else value for name, value in more.items()
        }
        latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
        yield denoiser(latents, timestep, torch.cat(embeds), cache=cache, **twice)[:2]
        return
    batch = latents.shape[0]
    for index, condition in enumerate(embeds):
        rows = None if cache is None else take_rows(cache, index * batch, (index + 1) * batch)
        yield denoiser(latents, timestep, condition, cache=rows, **more)[:2]
