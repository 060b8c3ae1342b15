"""Times a call and its memory: CUDA events or the clock, warm-up apart, what compiled something not counted."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch._dynamo.utils import counters

from sftk.runtime.cuda_graphs import captured_graphs

MOST_COMPILING = 4
"""Repeats that compiled something and are made again, at most; more would never end where each one compiles."""


@attrs.frozen(kw_only=True)
class Measurement:
    """What repeats of a call took.

    Args:
        seconds: of each counted repeat, on the device.
        host_seconds: median until the call returned; close to `seconds` where the host, not the device, sets the pace.
        warmup_seconds: of all that came before, compilation included.
        graphs: how many graphs were compiled, or captured, meanwhile.
        compiling: whether even the counted repeats compiled something.
        held, allocated, reserved: bytes of device memory: allocated before the call, most allocated and most reserved in it.
            None on a CPU.
    """

    seconds: tuple[float, ...]
    host_seconds: float
    warmup_seconds: float
    graphs: int
    compiling: bool
    held: int | None
    allocated: int | None
    reserved: int | None

    @property
    def median(self) -> float:
        """Of the counted repeats."""
        return statistics.median(self.seconds)


def measure(
    call: Callable[[], Any], device: torch.device, *, warmup: int = 1, repeats: int = 3, most_seconds: float = float("inf")
) -> Measurement:
    """Runs a call `warmup` times, then `repeats` times with a clock.

    Args:
        call: what to time; its result is dropped.
        device: where it computes.
        warmup: calls before the first that counts. A repeat that compiles a graph is not counted, either.
        repeats: counted calls at most, at least one. most_seconds: no further one begins when they took this long together.

    Example:
        >>> found = measure(lambda: torch.ones(8).sum(), torch.device("cpu"), repeats=3)
        >>> len(found.seconds), found.graphs, found.allocated
        (3, 0, None)
    """
    graphs, began = _graphs(), time.perf_counter()
    _collect(device)
    if device.type == "cuda" and warmup:
        torch.cuda.empty_cache()  # what other calls reserved is not this one's; the warm-up reserves it anew
    for _ in range(warmup):
        call()
    _wait(device)
    _collect(device)
    timed: list[tuple[float, float, bool]] = []
    peaks: list[tuple[int, int]] = []
    held, again, counted = None, 0, 0.0
    warmup_seconds = time.perf_counter() - began
    while len(timed) < repeats and (not timed or counted < most_seconds):
        before = _graphs()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        seconds, host = _time(call, device)
        compiled = _graphs() != before
        if compiled and again < MOST_COMPILING:
            again += 1
            warmup_seconds += seconds
            continue
        counted += seconds
        timed.append((seconds, host, compiled))
        if device.type == "cuda":
            peaks.append((torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)))
    return Measurement(
        seconds=tuple(seconds for seconds, _, _ in timed),
        host_seconds=statistics.median(host for _, host, _ in timed),
        warmup_seconds=warmup_seconds,
        graphs=_graphs() - graphs,
        compiling=any(compiled for *_, compiled in timed),
        held=held,
        allocated=max((allocated for allocated, _ in peaks), default=None),
        reserved=max((reserved for _, reserved in peaks), default=None),
    )


def _time(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of a call on the device, and until it returned."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        return seconds, seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _wait(device)
    began = time.perf_counter()
    start.record()
    call()
    end.record()
    host = time.perf_counter() - began
    end.synchronize()
    return start.elapsed_time(end) / 1e3, host


def _collect(device: torch.device) -> None:
    """Frees cycles, which hold memory that a peak would count; on a CPU there are no peaks to read."""
    if device.type == "cuda":
        gc.collect()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _graphs() -> int:
    """Graphs that were compiled, and CUDA graphs that were captured, in this process."""
    return counters["stats"]["unique_graphs"] + captured_graphs()
