"""Numbers of the host as tensors, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers as a tensor on a device.

    `torch.tensor(values, device="cuda")` waits until the GPU has done all that it was given before; this copies from pinned
    memory, and the host goes on.

    Args:
        values: numbers, nested or not.
        dtype: None takes what `torch.tensor` would.

    Example:
        >>> on_device([1, 2], "cpu")
        tensor([1, 2])
    """
    device = torch.device(device)
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
