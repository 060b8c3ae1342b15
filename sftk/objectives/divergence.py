"""f-divergences other than DMD's reverse KL: each sample's gradient weighted by its density ratio of teacher and student."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.objectives.dmd import at_least_float32

Divergence = Literal["reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys"]
"""From the most mode-seeking to the least."""


def f_divergence(ratio: Tensor, divergence: Divergence) -> Tensor:
    """The convex f of `D_f(p || q) = E_q[f(p / q)]`; f(1) is 0.

    Args:
        ratio: p / q, any shape, above 0; p is the teacher's density and q the student's.
        divergence: which one.

    Source: f-distill, arXiv 2502.15681, table 1.

    Example:
        >>> f_divergence(torch.tensor([1.0, 4.0]), "squared_hellinger")
        tensor([ 0., -1.])
    """
    r = ratio
    if divergence == "reverse_kl":
        return -r.log()
    if divergence == "softened_reverse_kl":
        return (r + 1) * (0.5 + 0.5 / r).log()
    if divergence == "jensen_shannon":
        return r * r.log() - (r + 1) * ((r + 1) / 2).log()
    if divergence == "squared_hellinger":
        return 1 - r.sqrt()
    if divergence == "forward_kl":
        return r * r.log()
    return (r - 1) * r.log()


def divergence_weight(log_ratio: Tensor, divergence: Divergence) -> Tensor:
    """`h(r) = f''(r) r^2`, with which the gradient of an f-divergence weighs the difference of the scores.

    `grad D_f = -E_q[h(p / q) (score_p - score_q) dx]`: DMD is h = 1.

    Args:
        log_ratio: log of p / q, any shape.
        divergence: which one.

    Source: f-distill, arXiv 2502.15681, theorem 1 and table 1.

    Example:
        >>> divergence_weight(torch.tensor([0.0]), "jensen_shannon")
        tensor([0.5000])
    """
    if divergence == "reverse_kl":
        return torch.ones_like(log_ratio)
    if divergence == "softened_reverse_kl":
        return torch.sigmoid(-log_ratio)
    if divergence == "jensen_shannon":
        return torch.sigmoid(log_ratio)
    if divergence == "squared_hellinger":
        return (log_ratio / 2).exp() / 4
    if divergence == "forward_kl":
        return log_ratio.exp()
    return log_ratio.exp() + 1


@transform(out="log_ratio_mean", kind="reduced", example=lambda batch, randn: {"logits": randn(batch, 5)})
def mean_log_ratio(logits: Tensor):
    """Log of the batch's mean density ratio. Over the student's samples it would be 0 if the discriminator were right.

    Args:
        logits: [B] or [B, ...], see `weigh_samples`.

    Returns:
        log_ratio_mean: [] float32, without gradient.

    Source: f-distill, arXiv 2502.15681, section 3.3. The paper keeps a running mean for each range of noise levels; this one
    holds for the micro-batch.

    Example:
        >>> mean_log_ratio(torch.tensor([0.0, 3.0]).log1p())
        tensor(0.9163)
    """
    logits = at_least_float32(logits.detach())
    ratio = logits.flatten(1).mean(dim=1) if logits.dim() > 1 else logits
    return ratio.logsumexp(dim=0) - math.log(len(ratio))


def _example(batch: int, randn) -> dict:
    mask = (randn(batch, 3) > 0).index_fill(1, torch.tensor([0]), True)
    return {"logits": randn(batch, 5), "gradient_mask": mask, "divergence": "jensen_shannon"}


@transform(out="gradient_weight", kind="per_sample", example=_example)
def weigh_samples(
    logits: Tensor,
    gradient_mask: Tensor | None = None,
    log_ratio_mean: Tensor | None = None,
    *,
    divergence: Divergence = "jensen_shannon",
    clamp: tuple[float, float] = (-5.0, 5.0),
):
    """Weights that make DMD descend another f-divergence: bind them to the `gradient_mask` of `surrogate_loss`.

    A loss is a sum and a weight here, so this normalises the weights to a mean of 1 over the global batch, as the paper has it
    for one batch: the sum of `h grad` over the sum of `h`.

    Args:
        logits: [B] or [B, ...], a discriminator's on the noised samples of the student, high where they look real; their mean
            over a sample is log p / q.
        gradient_mask: [B, F] bool, frames that carry gradient.
        log_ratio_mean: [], from `mean_log_ratio`, taken off before anything else.
        divergence: `reverse_kl` leaves DMD as it is; `jensen_shannon` did best in the paper; `forward_kl` covers modes most
            and varies most.
        clamp: lowest and highest log p / q.

    Returns:
        gradient_weight: [B, F] (or [B, 1] without a mask) float32, without gradient.

    Source: f-distill, arXiv 2502.15681, eq. 8 and section 3.3.

    Example:
        >>> weigh_samples(torch.tensor([0.0, 9.0]), divergence="forward_kl")
        tensor([[  1.0000],
                [148.4132]])
    """
    log_ratio = at_least_float32(logits.detach())
    log_ratio = log_ratio.flatten(1).mean(dim=1) if log_ratio.dim() > 1 else log_ratio
    if log_ratio_mean is not None:
        log_ratio = log_ratio - log_ratio_mean
    weight = divergence_weight(log_ratio.clamp(*clamp), divergence)[:, None]
    return weight if gradient_mask is None else weight * gradient_mask
