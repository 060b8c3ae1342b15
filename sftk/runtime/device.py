"""The device of a run and what is set on it once."""

from __future__ import annotations

import torch

from sftk.errors import SftkError


def pick_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is CUDA where there is one.

    Raises:
        SftkError: CUDA is asked for and there is none.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SftkError("the recipe says device: cuda, but PyTorch finds no CUDA device; use device: auto or cpu")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    """The device in words.

    Example:
        >>> device_name(torch.device("cpu")).startswith("cpu")
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
