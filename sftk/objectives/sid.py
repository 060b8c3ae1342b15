"""Score identity distillation: a loss whose gradient passes through both scores."""

from __future__ import annotations

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.objectives.dmd import at_least_float32, element_mask, per_sample_normalizer


def _example(batch: int, randn) -> dict:
    mask = (randn(batch, 3) > 0).index_fill(1, torch.tensor([0]), True)
    return {name: randn(batch, 3, 4, 2, 2) for name in ("x0", "fake_x0", "real_x0")} | {"gradient_mask": mask, "alpha": 0.8}


@transform(out=("loss", "loss_weight"), kind="reduced", example=_example)
def sid_loss(
    x0: Tensor,
    fake_x0: Tensor,
    real_x0: Tensor,
    gradient_mask: Tensor | None = None,
    *,
    alpha: float = 1.0,
    normalize: bool = True,
    guard: bool = True,
):
    """`(real - fake) ((real - x0) - alpha (real - fake)) / mean |x0 - real|`.

    Args:
        x0: [B, F, C, H, W], the student's sample, with history.
        fake_x0: the critic's prediction at a noisy version of it, with history down to x0.
        real_x0: the teacher's prediction there, guided, with history down to x0.
        gradient_mask: [B, F] or x0's shape, bool; frames (or elements) that enter the loss.
        alpha: how much of the squared difference is taken off; 1 is usual, 0.5 is the plain Fisher divergence.
        normalize: divide by the normaliser of each sample, which carries no gradient.
        guard: keep the normaliser from vanishing; without it NaN becomes 0, as in the public code.

    Returns:
        loss: [] float32, the sum. loss_weight: [], how many elements it sums.

    Source: SiD, arXiv 2404.04057, algorithm 1; Self-Forcing, arXiv 2506.08009, section 3.3.

    Example:
        >>> one = torch.ones(1, 2)
        >>> loss, weight = sid_loss(one, 2 * one, 4 * one, alpha=1.0)  # (4-2) ((4-1) - (4-2)) / 3
        >>> round((loss / weight).item(), 4)
        0.6667
    """
    x0, fake_x0, real_x0 = (at_least_float32(x) for x in (x0, fake_x0, real_x0))
    difference = real_x0 - fake_x0
    loss = difference * ((real_x0 - x0) - alpha * difference)
    if normalize:
        loss = loss / per_sample_normalizer(x0, real_x0, guard)
    if not guard:
        loss = torch.nan_to_num(loss)
    weight = element_mask(gradient_mask, x0)
    return (weight * loss).sum(), weight.sum()
