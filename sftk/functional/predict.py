"""Calls of a model port, as transforms: flow, x0, guided x0, teacher-forced flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sftk.core.geometry import block_problems, split_blocks
from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional.cache import KVCache, LayerKV
from sftk.functional.guidance import guide
from sftk.functional.layout import Layout
from sftk.functional.noise import flow_to_x0
from sftk.functional.schedule import ScheduleName, timestep_to_sigma


class Denoiser(Protocol):
    """The model port: plain tensors in and out, the same for every backbone.

    Args:
        latents: [B, F, C, H, W].
        timestep: [B, F], in [0, 1000].
        prompt_embeds: [B, L, D].
        cache: context that the frames see besides one another.
        layout: which frames see which; None is all.
        positions: temporal position of each frame; by default 0, 1, 2 ...
        features_at: layers whose hidden states to return.
        interval: [B, F], for a model that predicts average velocities: the timesteps over which, from `timestep` down. Given
            by name, and only to such a model.

    Returns:
        flow [B, F, C, H, W]; keys and values of each layer; the hidden states asked for, [B, tokens, width].
    """

    # fmt: off
    def __call__(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, *, cache: KVCache | None = None,
        layout: Layout | None = None, positions: Sequence[int] | None = None, features_at: Sequence[int] = (),
        interval: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[LayerKV], tuple[Tensor, ...]]: ...
    # fmt: on


def toy_denoiser(
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    *,
    cache=None,
    layout=None,
    positions=None,
    features_at=(),
    interval=None,
):
    """A few multiplications behind the model port, for examples and laws.

    Example:
        >>> flow, kv, features = toy_denoiser(torch.ones(1, 3, 4, 2, 2), torch.zeros(1, 3), torch.zeros(1, 2, 8))
        >>> flow.shape, kv[0][0].shape
        (torch.Size([1, 3, 4, 2, 2]), torch.Size([1, 3, 1, 16]))
    """
    past = 0.0 if cache is None or cache.layer(0) is None else cache.layer(0)[1].mean(dim=(1, 2, 3))[:, None, None, None, None]
    time = ((timestep if interval is None else timestep - interval / 2) / 1000)[:, :, None, None, None]
    flow = 0.5 * latents.tanh() + 0.1 * time + 0.2 * prompt_embeds.mean(dim=(1, 2))[:, None, None, None, None] + 0.3 * past
    kv = flow.flatten(2)[:, :, None]
    return flow, ((kv, 2 * kv, prompt_embeds[:, :, None], prompt_embeds[:, :, None]),), tuple(flow for _ in features_at)


def _example(batch: int, randn) -> dict:
    return {
        "denoiser": toy_denoiser,
        "noisy": randn(batch, 6, 4, 2, 2),
        "timestep": randn(batch, 6).sigmoid() * 1000,
        "prompt_embeds": randn(batch, 2, 8),
    }


def _cfg_example(batch: int, randn) -> dict:
    return _example(batch, randn) | {"negative_embeds": randn(batch, 2, 8), "scale": 4.0}


def _forced_example(batch: int, randn) -> dict:
    negative = {"negative_embeds": randn(batch, 2, 8), "scale": 2.0}
    return _example(batch, randn) | {"latents": randn(batch, 6, 4, 2, 2)} | negative


@transform(out="flow", kind="per_sample", models=("denoiser",), example=_example, check=block_problems)
def predict_flow(
    denoiser: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    interval: Tensor | None = None,
    *,
    frames_per_block: int | None = None,
    independent_first_frame: bool = False,
    window: int | None = None,
    sink: int = 0,
):
    """The flow `noise - x0` that a model predicts.

    Args:
        denoiser: see `Denoiser`.
        noisy: [B, F, C, H, W].
        timestep: [B, F], in [0, 1000].
        prompt_embeds: [B, L, D].
        interval: [B, F], timesteps over which the flow is an average, for a model that takes them.
        frames_per_block: makes the pass block-causal; None is bidirectional.
        independent_first_frame, window, sink: of the block-causal pass.

    Returns:
        flow: [B, F, C, H, W].

    Example:
        >>> predict_flow(toy_denoiser, torch.zeros(1, 3, 4, 2, 2), torch.zeros(1, 3), torch.zeros(1, 2, 8)).abs().max()
        tensor(0.)
    """
    layout = None
    if frames_per_block is not None:
        blocks = split_blocks(noisy.shape[1], frames_per_block, independent_first_frame)
        layout = Layout(kind="block_causal", blocks=blocks, window=window, sink=sink)
    more: dict[str, Any] = {} if interval is None else {"interval": interval}
    return denoiser(noisy, timestep, prompt_embeds, layout=layout, **more)[0]


@transform(out="x0", kind="per_sample", models=("denoiser",), example=_example, check=block_problems)
def predict_x0(
    denoiser: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    *,
    schedule: ScheduleName = "continuous",
    shift: float = 1.0,
    frames_per_block: int | None = None,
    independent_first_frame: bool = False,
    window: int | None = None,
    sink: int = 0,
):
    """The clean latents that a model predicts: `x_t - sigma flow`.

    Args:
        noisy, timestep, prompt_embeds, frames_per_block, ...: see `predict_flow`.
        schedule, shift: how the timestep becomes the sigma with which the flow is read, see `timestep_to_sigma`.

    Returns:
        x0: [B, F, C, H, W].

    Example:
        >>> predict_x0(toy_denoiser, torch.ones(1, 3, 4, 2, 2), torch.zeros(1, 3), torch.zeros(1, 2, 8)).mean()
        tensor(1.)
    """
    flow = predict_flow(
        denoiser,
        noisy,
        timestep,
        prompt_embeds,
        frames_per_block=frames_per_block,
        independent_first_frame=independent_first_frame,
        window=window,
        sink=sink,
    )
    return flow_to_x0(noisy, flow, timestep_to_sigma(timestep, schedule, shift))


@transform(out="x0", kind="per_sample", models=("denoiser",), example=_cfg_example)
def predict_x0_cfg(
    denoiser: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    scale: float,
    schedule: ScheduleName = "continuous",
    shift: float = 1.0,
    batched: bool = False,
):
    """The clean latents that a model predicts under classifier-free guidance.

    Args:
        noisy, timestep, prompt_embeds: see `predict_flow`.
        negative_embeds: [B, L, D], the unconditional embeddings.
        scale: `uncond + scale (cond - uncond)`; 1 makes one pass only. The public code's w is scale - 1.
        schedule, shift: see `predict_x0`.
        batched: both passes in one call of twice the batch.

    Returns:
        x0: [B, F, C, H, W].

    Source: classifier-free guidance, arXiv 2207.12598, eq. 6.

    Example:
        >>> one = torch.ones(1, 3, 4, 2, 2)
        >>> predict_x0_cfg(toy_denoiser, one, torch.zeros(1, 3), torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), scale=4.0).mean()
        tensor(1.)
    """
    if scale == 1.0:
        return predict_x0(denoiser, noisy, timestep, prompt_embeds, schedule=schedule, shift=shift)
    sigma = timestep_to_sigma(timestep, schedule, shift)
    if batched:
        embeds = torch.cat([prompt_embeds, negative_embeds])
        flow = denoiser(torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), embeds)[0]
        cond, uncond = flow.chunk(2)
    else:
        cond = denoiser(noisy, timestep, prompt_embeds)[0]
        uncond = denoiser(noisy, timestep, negative_embeds)[0]
    return guide(flow_to_x0(noisy, cond, sigma), flow_to_x0(noisy, uncond, sigma), scale=scale)


@transform(out="flow", kind="per_sample", models=("denoiser",), example=_forced_example, check=block_problems)
def predict_flow_teacher_forced(
    denoiser: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    latents: Tensor,
    prompt_embeds: Tensor,
    clean_timestep: Tensor | None = None,
    negative_embeds: Tensor | None = None,
    *,
    scale: float = 1.0,
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
):
    """The flow of every block given the clean frames before it, all blocks in one pass.

    Args:
        noisy, timestep, prompt_embeds: see `predict_flow`; the timestep may differ between blocks.
        latents: [B, F, C, H, W], the clean frames (or slightly noised ones).
        clean_timestep: [B, F], what the network is told of the clean frames; 0 by default.
        negative_embeds: [B, L, D], for guidance.
        scale: guidance, see `predict_x0_cfg`; 1 makes one pass only.
        frames_per_block, independent_first_frame: the blocks.

    Returns:
        flow: [B, F, C, H, W], of the noisy frames.

    Source: teacher forcing as Self-Forcing's baseline has it, arXiv 2506.08009, section 3.1.

    Example:
        >>> x = torch.zeros(1, 3, 4, 2, 2)
        >>> predict_flow_teacher_forced(toy_denoiser, x, torch.zeros(1, 3), x, torch.zeros(1, 2, 8)).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    if noisy.shape != latents.shape:
        raise ShapeError(f"noisy {list(noisy.shape)} and clean latents {list(latents.shape)} must have the same shape")
    layout = Layout(kind="teacher_forcing", blocks=split_blocks(noisy.shape[1], frames_per_block, independent_first_frame))
    clean_timestep = torch.zeros_like(timestep) if clean_timestep is None else clean_timestep
    both, times = torch.cat([latents, noisy], 1), torch.cat([clean_timestep, timestep], 1)
    flow: Any = denoiser(both, times, prompt_embeds, layout=layout, positions=layout.positions)[0]
    if scale != 1.0:
        if negative_embeds is None:
            raise ShapeError(f"guidance of scale {scale} needs negative_embeds")
        uncond: Any = denoiser(both, times, negative_embeds, layout=layout, positions=layout.positions)[0]
        flow = guide(flow, uncond, scale=scale)
    return flow[:, latents.shape[1] :]
