"""Profiles a call: writes its Chrome trace, and says where the time went."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sftk.runtime.bench_kernels import KernelTable, summarise


def profile_call(call: Callable[[], Any], device: torch.device, path: Path) -> KernelTable:
    """Runs a call once under PyTorch's profiler.

    On CUDA only the device and the calls to its driver are recorded: watching every operator would slow the host down, and the
    device would seem idle.

    Args:
        call: warmed up.
        path: of the trace, ending in `.json.gz`; Perfetto and chrome://tracing read it.
    """
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as recorded:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
    return read_trace(path)


def read_trace(path: Path) -> KernelTable:
    """The table of a Chrome trace, `.json` or `.json.gz`."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return summarise(json.load(file)["traceEvents"])
