"""Rewards: any differentiable judgement of x0, or of the frames decoded from it, as a loss, and losses added up."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.objectives.dmd import at_least_float32


class Decoder(Protocol):
    """Latents [B, F, C, H, W] to frames, differentiably, in whatever layout the reward takes."""

    def __call__(self, latents: Tensor) -> Tensor: ...


class Reward(Protocol):
    """Judges samples: higher is better.

    Args:
        video: what a `Decoder` gives, or latents.
        labels: what the samples should show: class labels [B], embeddings [B, L, D], whatever the reward knows.

    Returns:
        [B], differentiable with respect to `video`.
    """

    def __call__(self, video: Tensor, labels: Any) -> Tensor: ...


def _toy_decoder(latents: Tensor) -> Tensor:
    return latents.sigmoid().mean(dim=2)


def _toy_reward(video: Tensor, labels: Tensor) -> Tensor:
    return -(video.flatten(1).mean(dim=1) - labels).square()


@transform(
    out="video",
    kind="per_sample",
    models=("decoder",),
    example=lambda batch, randn: {"decoder": _toy_decoder, "x0": randn(batch, 3, 4, 2, 2)},
)
def decode(decoder: Decoder, x0: Tensor):
    """Latents to frames, with gradient.

    Args:
        decoder: see `Decoder`; its own weights are left alone.
        x0: [B, F, C, H, W].

    Returns:
        video: what the decoder makes of them, [B, F, ...].

    Example:
        >>> decode(_toy_decoder, torch.zeros(1, 3, 4, 2, 2)).shape
        torch.Size([1, 3, 2, 2])
    """
    return decoder(x0)


def _score_example(batch: int, randn) -> dict:
    return {"reward": _toy_reward, "video": randn(batch, 3, 2, 2), "labels": randn(batch)}


@transform(out="score", kind="per_sample", models=("reward",), example=_score_example)
def score_reward(reward: Reward, video: Tensor, labels: Any):
    """What a reward says of each sample.

    Args:
        reward: see `Reward`.
        video: [B, ...], from `decode`, or latents for a reward on those.
        labels: [B, ...], what the samples should show.

    Returns:
        score: [B].

    Raises:
        ShapeError: the reward returns another shape.

    Example:
        >>> score_reward(_toy_reward, torch.ones(2, 3), torch.tensor([1.0, 0.0]))
        tensor([-0., -1.])
    """
    score = reward(video, labels)
    if score.shape != video.shape[:1]:
        raise ShapeError(f"a reward returns one number for each of {video.shape[0]} samples, found {list(score.shape)}")
    return score


@transform(out=("loss", "loss_weight"), kind="reduced", example=lambda batch, randn: {"score": randn(batch)})
def reward_loss(score: Tensor):
    """Minus the mean reward.

    Args:
        score: [B], from `score_reward`.

    Returns:
        loss: [] float32, minus the sum. loss_weight: [], the number of samples.

    Source: reward gradients through the sampler, as in DRaFT, arXiv 2309.17400, eq. 2.

    Example:
        >>> reward_loss(torch.tensor([1.0, 3.0]))
        (tensor(-4.), tensor(2.))
    """
    score = at_least_float32(score)
    return -score.sum(), torch.full_like(score[0].detach(), float(score.numel()))


def _combine_example(batch: int, randn) -> dict:
    names = ("loss", "loss_weight", "other_loss", "other_loss_weight")
    return {name: randn(2).exp().sum() for name in names} | {"scale": 0.5}


@transform(out=("total", "total_weight"), kind="reduced", example=_combine_example)
def combine_losses(loss: Tensor, loss_weight: Tensor, other_loss: Tensor, other_loss_weight: Tensor, *, scale: float):
    """A loss plus a multiple of another, as sum and weight: `mean + scale other_mean`, with the first one's weight.

    The two means are added exactly within a micro-batch. Over several (accumulation, ranks) the second is averaged with the
    weights of the first, which is exact where both weights are in proportion: micro-batches of equal size without masks. To
    add more losses, use it again.

    Args:
        loss, loss_weight: [] each, a sum and what it is divided by.
        other_loss, other_loss_weight: [] each, the loss to add.
        scale: how much of it.

    Returns:
        total: [], the sum. total_weight: [], `loss_weight`.

    Example:
        >>> combine_losses(*map(torch.tensor, (6.0, 3.0, 10.0, 2.0)), scale=0.1)  # means 2 and 5
        (tensor(7.5000), tensor(3.))
    """
    loss, loss_weight = at_least_float32(loss), at_least_float32(loss_weight)
    share = loss_weight / at_least_float32(other_loss_weight)
    return loss + scale * at_least_float32(other_loss) * share, loss_weight
