"""Reads metrics off the device one step late, so that no step waits for another."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Meter:
    """Holds a step's metric tensors until the next step is under way; on a CPU they are there at once.

    Example:
        >>> meter = Meter(torch.device("cpu"))
        >>> meter.put(0, {"critic/loss": torch.tensor(0.5)})
        [(0, {'critic/loss': 0.5})]
    """

    def __init__(self, device: torch.device):
        self._delay = 1 if device.type == "cuda" else 0
        self._waiting: list[tuple[int, list[str], Tensor]] = []

    def put(self, step: int, metrics: dict[str, Tensor]) -> list[tuple[int, dict[str, float]]]:
        """Takes a step's metrics and returns those of the steps that can be read now."""
        names = list(metrics)
        stacked = torch.stack([metrics[name].detach().double().reshape(()) for name in names]) if names else torch.empty(0)
        self._waiting.append((step, names, stacked))
        return self._take(self._delay)

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """The steps not yet returned."""
        return self._take(0)

    def _take(self, leave: int) -> list[tuple[int, dict[str, float]]]:
        ready = []
        while len(self._waiting) > leave:
            step, names, values = self._waiting.pop(0)
            ready.append((step, dict(zip(names, values.tolist(), strict=True))))
        return ready


def first_nonfinite(values: dict[str, float]) -> str | None:
    """Name of the first value that is NaN or infinite, or None.

    Example:
        >>> first_nonfinite({"a/loss": 1.0, "b/loss": float("nan")})
        'b/loss'
    """
    return next((name for name, value in values.items() if not math.isfinite(value)), None)
