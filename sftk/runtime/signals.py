"""Signals that end a run after a checkpoint: they are collected, and all ranks agree on the step at which they stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what a scheduler sends some minutes before a job's time is over."""


@contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Collects the names of `STOPPING` signals in a list instead of dying; the second SIGINT interrupts at once.

    Outside the main thread, where Python lets nobody handle signals, the list stays empty.

    Raises:
        KeyboardInterrupt: at a SIGINT after another signal.

    Example:
        >>> with catch_signals() as caught:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     caught
        ['SIGTERM']
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(caught: Sequence[str]) -> str | None:
    """The signal that any rank has caught, the same on every rank; None where none has.

    A collective of the host's, which waits for the other hosts and not for devices: every rank calls it after the same step.
    Where ranks caught different ones, the signal of the highest number counts.

    Example:
        >>> agreed([]), agreed(["SIGTERM"])
        (None, 'SIGTERM')
    """
    number = max((int(signal.Signals[name]) for name in caught), default=0)
    if dist.is_initialized() and dist.get_world_size() > 1:
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        number = int(highest)
    return signal.Signals(number).name if number else None
