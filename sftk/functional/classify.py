"""A discriminator on a backbone's hidden states: logits of noisy latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.predict import Denoiser, toy_denoiser


class Discriminator(Protocol):
    """A classifier branch: hidden states of the backbone's layers `features_at` to logits.

    Args:
        features: [B, tokens, width] each.
        timestep: [B, F], that of the latents.

    Returns:
        [B, K].
    """

    features_at: Sequence[int]

    def __call__(self, features: tuple[Tensor, ...], timestep: Tensor) -> Tensor: ...


class ToyDiscriminator:
    """A mean square behind the discriminator's port, for examples and laws."""

    features_at = (0,)

    def __call__(self, features: tuple[Tensor, ...], timestep: Tensor) -> Tensor:
        level = (timestep.mean(dim=1, keepdim=True) / 1000).to(features[0].dtype)
        return features[0].flatten(1).square().mean(dim=1, keepdim=True) + level


def classify_example(batch: int, randn) -> dict:
    """Arguments of `classify`, of toy size."""
    return {
        "denoiser": toy_denoiser,
        "discriminator": ToyDiscriminator(),
        "noisy": randn(batch, 3, 4, 2, 2),
        "timestep": randn(batch, 3).sigmoid() * 1000,
        "prompt_embeds": randn(batch, 2, 8),
    }


@transform(out="logits", kind="per_sample", models=("denoiser", "discriminator"), example=classify_example)
def classify(denoiser: Denoiser, discriminator: Discriminator, noisy: Tensor, timestep: Tensor, prompt_embeds: Tensor):
    """Logits of noisy latents: how real they look to a branch on a backbone's hidden states.

    Args:
        denoiser: the backbone, see `Denoiser`.
        discriminator: the branch, see `Discriminator`.
        noisy: [B, F, C, H, W].
        timestep: [B, F], in [0, 1000].
        prompt_embeds: [B, L, D].

    Returns:
        logits: [B, K].

    Source: DMD2, arXiv 2405.14867, section 4.3.

    Example:
        >>> import torch
        >>> classify(**classify_example(2, torch.randn)).shape
        torch.Size([2, 1])
    """
    features = denoiser(noisy, timestep, prompt_embeds, features_at=tuple(discriminator.features_at))[2]
    return discriminator(features, timestep)
