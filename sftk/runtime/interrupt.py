"""How a run that a signal stopped ends: after a checkpoint, with an exit code of its own."""

from __future__ import annotations

import signal
from pathlib import Path

GO_ON_LATER = 75
"""Exit code of a run that SIGUSR1 stopped, EX_TEMPFAIL of sysexits.h: start the same command again with `--resume`."""


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint was saved first.

    Args:
        name: the signal, such as `SIGTERM`.
        step: the last step that was done, counted from 1.
        checkpoint: the checkpoint's folder.

    Example:
        >>> print(Interrupted("SIGTERM", 3, Path("run/checkpoints/dmd/step_00000003")))
        stopped by SIGTERM after step 3; saved run/checkpoints/dmd/step_00000003
    """

    def __init__(self, name: str, step: int, checkpoint: Path):
        self.signal, self.step, self.checkpoint = name, step, checkpoint
        super().__init__(f"stopped by {name} after step {step}; saved {checkpoint}")


def exit_code(number: int) -> int:
    """The exit code of a run that a signal stopped, after its checkpoint.

    Example:
        >>> exit_code(signal.SIGINT), exit_code(signal.SIGTERM), exit_code(signal.SIGUSR1)
        (130, 143, 75)
    """
    return GO_ON_LATER if number == signal.SIGUSR1 else 128 + number
