"""The device of a run and what is set on it once."""

from __future__ import annotations

import warnings
from typing import Literal

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


Precision = Literal["fp32", "tf32", "bf16", "fp64"]


def set_precision(precision: Precision) -> torch.dtype | None:
    """Sets how float32 matrix products are computed on CUDA, and returns the dtype of autocast, if any.

    Args:
        precision: `fp32` keeps float32 products exact, `tf32` rounds their factors to TensorFloat32, `bf16` computes models
            under bfloat16 autocast (what stays in float32 then uses TensorFloat32), `fp64` says nothing of float32.

    Example:
        >>> set_precision("bf16"), set_precision("fp32")
        (torch.bfloat16, None)
    """
    torch.set_float32_matmul_precision("highest" if precision in ("fp32", "fp64") else "high")
    # Inductor advises TensorFloat32; whoever writes `precision: fp32` has decided.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    return torch.bfloat16 if precision == "bf16" else None


def device_name(device: torch.device) -> str:
    """The device in words.

    Example:
        >>> device_name(torch.device("cpu")).startswith("cpu")
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads != 1)})"
