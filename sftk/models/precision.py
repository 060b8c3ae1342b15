"""In what dtype parts of a model compute."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """The tensor in float32 at least.

    Example:
        >>> upcast(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def autocast_to(x: Tensor) -> Tensor:
    """The tensor in autocast's dtype where autocast is on for its device, as a product would take it; else as it is.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_to(torch.zeros(1)).dtype
        torch.bfloat16
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
