"""How many programs and warps a kernel gets."""

from __future__ import annotations

import torch

ELEMENTS_PER_THREAD = 8
"""A load of 16 bytes in half precision; with more, registers leave room for too few programs on a processor."""


def warps_for(elements: int) -> int:
    """Warps of a program that holds a tile of so many elements.

    Example:
        >>> warps_for(2048), warps_for(64), warps_for(1 << 20)
        (8, 1, 16)
    """
    return max(1, min(16, elements // (32 * ELEMENTS_PER_THREAD)))


def programs_for(device: torch.device, per_processor: int) -> int:
    """Programs that keep a device busy where each goes through many rows.

    Example:
        >>> programs_for(torch.device("cpu"), 4)
        4
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * per_processor
