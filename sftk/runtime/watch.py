"""Says where a process hangs: the phase and the step, before the collective library ends it without a word of them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EARLY = 0.9
"""Share of the time limit after which a process says where it is: NCCL ends it when the limit is reached."""

LOST = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "broken pipe", "socket")
"""What errors of gloo, NCCL and the store say when another process is gone or does not answer."""


class Watch:
    """Remembers the place that a process has reached, and speaks up when it stays there too long.

    Example:
        >>> watch = Watch("rank 0")
        >>> watch.at("step 3, phase 'critic'")
        >>> watch.explain(RuntimeError("Timed out waiting 2000ms for recv operation to complete"))
        "rank 0 waited for another rank in step 3, phase 'critic': Timed out waiting 2000ms for recv operation to complete"
        >>> watch.explain(RuntimeError("shapes do not fit")) is None
        True
    """

    def __init__(self, who: str):
        self.who = who
        self._place, self._since, self._said = "the start", time.monotonic(), False

    def at(self, place: str) -> None:
        """This is where the process is now."""
        self._place, self._since, self._said = place, time.monotonic(), False

    def explain(self, error: Exception) -> str | None:
        """What an error means when it comes from a collective; None for any other."""
        text = str(error)
        lost = any(word in text.lower() for word in LOST)
        return f"{self.who} waited for another rank in {self._place}: {text.splitlines()[0]}" if lost else None

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Writes to standard error, once a place, when the process has been there for most of `seconds`."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(min(seconds * (1 - EARLY), 5.0)):
                waited = time.monotonic() - self._since
                if waited >= EARLY * seconds and not self._said:
                    self._said = True
                    print(f"{self.who} has been in {self._place} for {waited:.0f} s", file=sys.stderr, flush=True)

        thread = threading.Thread(target=look, name="sftk-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
