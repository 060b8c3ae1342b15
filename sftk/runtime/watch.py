"""Says where a process hangs: the phase and the step, before the collective library ends it without a word of them."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

EARLY = 0.9
"""Share of the time limit after which a process says where it is: NCCL ends it when the limit is reached."""

_GLOO = re.compile(r"\[\S*gloo/transport/\S+:\d+\] ")
"""How errors of gloo's connections begin, which have no type of their own: with the place in its source that raised them."""
_OWN = re.compile(r"\bnccl(UnhandledCudaError|InvalidArgument|InvalidUsage)\b")
"""Results that NCCL returns for what this process did itself; any other means that the network or another rank failed."""


class Watch:
    """Remembers the place that a process has reached, and speaks up when it stays there too long.

    Example:
        >>> watch = Watch("rank 0")
        >>> watch.at("step 3, phase 'critic'")
        >>> watch.explain(dist.DistStoreError("wait timeout after 2000ms, keys: /here"))
        "rank 0 waited for another rank in step 3, phase 'critic': wait timeout after 2000ms, keys: /here"
        >>> watch.explain(RuntimeError("the reward's server: socket timed out")) is None
        True
    """

    def __init__(self, who: str):
        self.who = who
        self._place, self._since, self._said = "the start", time.monotonic(), False

    def at(self, place: str) -> None:
        """This is where the process is now."""
        self._place, self._since, self._said = place, time.monotonic(), False

    def explain(self, error: Exception) -> str | None:
        """What an error of a collective or of the store means when another process is gone or does not answer; else None."""
        if not _lost(error):
            return None
        return f"{self.who} waited for another rank in {self._place}: {(str(error).splitlines() or [type(error).__name__])[0]}"

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


def _lost(error: Exception) -> bool:
    if isinstance(error, dist.DistBackendError):
        return _OWN.search(str(error)) is None
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and _GLOO.match(str(error)) is not None)
