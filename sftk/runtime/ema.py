"""Exponential moving averages of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """The average of one model's weights, a module of its own.

    Args:
        model: whose weights are averaged.
        decay: `average = decay average + (1 - decay) weights`.
        start: updates before this step copy the weights instead.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema = Ema(model, decay=0.75)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema.update(step=1)
        >>> ema.module.weight.item()
        0.75
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0):
        self.source, self.decay, self.start = model, decay, start
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights, or onto them before `start`."""
        average: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(self.source.parameters())
        if step < self.start:
            torch._foreach_copy_(average, weights)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(average, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
