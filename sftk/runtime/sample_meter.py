"""Seconds and peak memory of the parts of a sampling session."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SampleMeter:
    """Measures named parts, one after the other.

    Args:
        device: whose memory counts. On CUDA it is what tensors take; on the CPU the process's peak so far, files among it.

    Example:
        >>> meter = SampleMeter(torch.device("cpu"))
        >>> with meter.part("load"):
        ...     pass
        >>> [*meter.seconds], meter.peak["load"] > 0
        (['load'], True)
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a part."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _resident_peak()
        self.peak[name] = max(self.peak.get(name, 0), peak)

    def report(self) -> dict[str, Any]:
        """`seconds` and `peak_memory_bytes` by part, and in all."""
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        total = {"total": round(sum(self.seconds.values()), 3)}
        return {"seconds": seconds | total, "peak_memory_bytes": {**self.peak, "total": max(self.peak.values(), default=0)}}


def _resident_peak() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
