"""How a command ends that failed: one clear message and an exit code instead of a traceback."""

from __future__ import annotations

import errno
import signal
import sys

from sftk.errors import SftkError, SpecError
from sftk.runtime.interrupt import Interrupted, exit_code

FAILED = 1
USAGE_ERROR = 2

_OUT_OF_MEMORY = "`sftk plan` says what takes memory; batch.per_rank, a model's checkpoint: full or fewer frames lower it"
_HINTS = {
    errno.ENOSPC: "make room; a run then goes on with --resume",
    errno.EDQUOT: "make room; a run then goes on with --resume",
    errno.EACCES: "take a folder that you may write to, such as with --run-dir",
    errno.EROFS: "take a folder that you may write to, such as with --run-dir",
}


def ending(error: BaseException) -> tuple[str, int] | None:
    """What to print and the exit code; None for what no user causes, which keeps its traceback.

    A user's mistake in a recipe gives 2, a failed run 1, an interrupted one what `exit_code` says.

    Example:
        >>> ending(SpecError("unknown key 'evry'"))
        ("error: 1 problem\\n  unknown key 'evry'", 2)
        >>> ending(KeyError("x")) is None
        True
    """
    match error:
        case SpecError():
            count = len(error.problems)
            return f"error: {count} problem{'s' * (count != 1)}\n" + "\n".join(f"  {p}" for p in error.problems), USAGE_ERROR
        case SftkError():
            return f"error: {error}", FAILED
        case OSError() if error.errno != errno.EPIPE:  # the reader of a pipe has gone, which click ends quietly
            return f"error: {_system_error(error)}", FAILED
        case Interrupted():
            return f"{error}; go on with --resume", exit_code(signal.Signals[error.signal])
        case KeyboardInterrupt():
            return "stopped by SIGINT; a run goes on from its last checkpoint with --resume", exit_code(signal.SIGINT)
        case RuntimeError() if _is_out_of_memory(error):
            return f"error: {str(error).splitlines()[0]}\n{_OUT_OF_MEMORY}", FAILED
    return None


def _system_error(error: OSError) -> str:
    """What the operating system refused, and what to do.

    Example:
        >>> _system_error(PermissionError(errno.EACCES, "Permission denied", "runs"))
        'runs: permission denied; take a folder that you may write to, such as with --run-dir'
    """
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    text = f"{error.filename}: {reason[:1].lower()}{reason[1:]}" if error.filename else reason
    return "; ".join(filter(None, (text, _HINTS.get(error.errno or 0))))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Without an import: where torch was not imported, it did not raise."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
