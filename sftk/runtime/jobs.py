"""Child processes: a run beside others, with a log of its own and its share of the processor's threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sftk.errors import SftkError

_COMMAND = (sys.executable, "-m", "sftk")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Job:
    """An `sftk` command in a process of its own, from its start on.

    It does not get the terminal's Ctrl-C: whoever starts it passes signals on, so that it gets each once.

    Args:
        arguments: of `sftk`.
        log: file to which its output is appended.
        threads: of its share of the processor.
        keep: file descriptors that it keeps open (a lock).

    Example:
        >>> import tempfile
        >>> job = Job(["--version"], Path(tempfile.mkdtemp()) / "log.txt", threads=1)
        >>> job.wait(), job.tail()[-1].startswith("sftk, version")
        (0, True)
    """

    def __init__(self, arguments: Sequence[str], log: Path, *, threads: int, keep: Sequence[int] = ()):
        self.log, self.began = log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"$ sftk {subprocess.list2cmdline(arguments)}\n".encode())
            output.flush()
            self._from = output.tell()
            self._process = subprocess.Popen(
                [*_COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict.fromkeys(_THREADS, str(threads)) | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                pass_fds=tuple(keep),
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Waits for the exit code."""
        return self._process.wait()

    def signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            self._process.send_signal(number)

    def tail(self, lines: int = 12) -> list[str]:
        """The error message that ends what this process wrote, or else its last lines; at most so many."""
        with self.log.open("rb") as file:
            file.seek(self._from)
            printed = file.read().decode(errors="replace").rstrip().splitlines()
        error = next((index for index in reversed(range(len(printed))) if printed[index].startswith("error: ")), None)
        return printed[-lines:] if error is None else printed[error:][:lines]


def available_threads() -> int:
    """Threads to be divided: `OMP_NUM_THREADS`, or as many as there are processors for this process.

    Example:
        >>> available_threads() >= 1
        True
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isascii() and said.isdigit() and int(said):
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def locked(path: Path) -> Iterator[list[int]]:
    """Keeps a folder for one command: yields the descriptors of its lock, which child processes may hold on to.

    A child that outlives its killed parent keeps the lock, so that nobody writes where it still writes.

    Raises:
        SftkError: another process has it.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp()) / "lock") as held:
        ...     len(held)
        1
    """
    try:
        import fcntl
    except ImportError:  # no locks on this system
        yield []
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SftkError(
                f"{path.parent} is in use by another `sftk run`, or by runs that a killed one left behind; "
                "wait until they end, or end them"
            ) from error
        yield [file.fileno()]
