"""Consistency distillation: two points of one trajectory must have the same end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.objectives.dmd import at_least_float32, element_mask


def _example(batch: int, randn) -> dict:
    return {"x0": randn(batch, 3, 4, 2, 2), "target_x0": randn(batch, 3, 4, 2, 2), "huber": 0.1}


def _check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["huber"] < 0:
        yield "huber", f"a width is at least 0, found {options['huber']}"


@transform(out=("loss", "loss_weight"), kind="reduced", example=_example, check=_check)
def consistency_loss(x0: Tensor, target_x0: Tensor, gradient_mask: Tensor | None = None, *, huber: float = 0.0):
    """Distance of the ends that the student and its average give two neighbouring points of a trajectory.

    Args:
        x0: [B, F, C, H, W], the student's, at the noisier point.
        target_x0: the average's, at the other one; without gradient.
        gradient_mask: [B, F] bool, frames that enter the loss.
        huber: 0 is the squared error; above 0 the pseudo-Huber distance `sqrt(d^2 + c^2) - c` of each element, c this width.

    Returns:
        loss: [] float32, the sum. loss_weight: [], the number of elements.

    Source: consistency models, arXiv 2303.01469, algorithm 2; pseudo-Huber, arXiv 2310.14189, section 3.3.

    Example:
        >>> consistency_loss(torch.zeros(1, 2), torch.ones(1, 2))
        (tensor(2.), tensor(2.))
    """
    squared = (at_least_float32(x0) - at_least_float32(target_x0).detach()) ** 2
    loss = squared if huber == 0 else torch.sqrt(squared + huber**2) - huber
    weight = element_mask(gradient_mask, squared)
    return (weight * loss).sum(), weight.sum()
