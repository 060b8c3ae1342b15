"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sftk.runtime.shards import local


class Ema:
    """The average of one model's weights: tensors that lie, and are sharded, as the weights are.

    Until step `start` it is the weights themselves and takes no memory. Nothing is gathered, ever.

    Args:
        model: whose weights are averaged.
        decay: `average = decay average + (1 - decay) weights`.
        start: updates before this step copy the weights instead.
        module: a module that shall hold the average, for graphs that call it beside the model; else the average is swapped
            into the model where it is evaluated, see `swapped`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema = Ema(model, decay=0.75)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema.update(step=1)
        >>> ema.state_dict()["weight"].item()
        0.75
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0, module: nn.Module | None = None):
        self.source, self.decay, self.start, self.module = model, decay, start, module
        self._tensors: dict[str, Tensor] | None = None if module is None else dict(module.state_dict())
        if start <= 0 and module is None:
            self.begin()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights, or onto them before `start`; `step` was just made."""
        if self._tensors is None:
            if step + 1 >= self.start:
                self.begin()
            return
        average, weights = self._pairs()
        if step < self.start:
            torch._foreach_copy_(average, weights)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(average, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """The average under the model's names, the tensors themselves; before it begins, the weights."""
        return dict(self.source.state_dict()) if self._tensors is None else dict(self._tensors)

    @property
    def config(self) -> Any:
        """The model's, for files of the average."""
        return getattr(self.source, "config", None)

    @property
    def begun(self) -> bool:
        """Whether it has tensors of its own, to be saved and restored."""
        return self._tensors is not None

    @torch.no_grad()
    def begin(self) -> None:
        """Takes tensors of its own, a copy of the weights; to restore an average, write into those of `state_dict` then."""
        if self._tensors is None:
            self._tensors = {name: tensor.detach().clone() for name, tensor in self.source.state_dict().items()}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model computes with the average inside; the weights are put back, bit by bit.

        Gathered weights of a sharded model must be freed before and after (`GradientSync.rest`).
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self._tensors is None:
            return
        for average, weight in zip(*self._pairs(), strict=True):
            kept = average.clone()
            average.copy_(weight)
            weight.copy_(kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        assert self._tensors is not None
        weights = self.source.state_dict()
        return [local(tensor) for tensor in self._tensors.values()], [local(weights[name]) for name in self._tensors]
