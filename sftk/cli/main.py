"""Entry point: groups the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import signal
import sys
from typing import Any

import click
import torch

import sftk
from sftk.cli.bench import bench
from sftk.cli.check import check
from sftk.cli.data import data
from sftk.cli.doctor import doctor
from sftk.cli.export import export
from sftk.cli.fetch import fetch
from sftk.cli.plan import plan
from sftk.cli.run import run
from sftk.cli.sample import sample
from sftk.cli.show import show
from sftk.cli.slurm import slurm
from sftk.errors import SftkError, SpecError
from sftk.runtime.signals import Interrupted, exit_code

USAGE_ERROR = 2


_OUT_OF_MEMORY = "`sftk plan` says what takes memory; batch.per_rank, a model's checkpoint: full or fewer frames lower it"
_HINTS = {
    errno.ENOSPC: "make room; a run then goes on with --resume",
    errno.EDQUOT: "make room; a run then goes on with --resume",
    errno.EACCES: "take a folder that you may write to, such as with --run-dir",
    errno.EROFS: "take a folder that you may write to, such as with --run-dir",
}


def _system_error(error: OSError) -> str:
    """What the operating system refused, and what to do.

    Example:
        >>> _system_error(PermissionError(errno.EACCES, "Permission denied", "runs"))
        'runs: permission denied; take a folder that you may write to, such as with --run-dir'
    """
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    text = f"{error.filename}: {reason[:1].lower()}{reason[1:]}" if error.filename else reason
    return "; ".join(filter(None, (text, _HINTS.get(error.errno or 0))))


class Commands(click.Group):
    """A group whose commands end with one clear message instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; a user's mistake exits with 2, a failed run with 1, an interrupted one as `exit_code` says."""
        try:
            return super().invoke(ctx)
        except SpecError as error:
            count = len(error.problems)
            click.echo(f"error: {count} problem{'s' * (count != 1)}\n" + "\n".join(f"  {p}" for p in error.problems), err=True)
            sys.exit(USAGE_ERROR)
        except SftkError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except torch.OutOfMemoryError as error:
            click.echo(f"error: {str(error).splitlines()[0]}\n{_OUT_OF_MEMORY}", err=True)
            sys.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has gone, which click ends quietly
                raise
            click.echo(f"error: {_system_error(error)}", err=True)
            sys.exit(1)
        except Interrupted as stop:
            click.echo(f"{stop}; go on with --resume", err=True)
            sys.exit(exit_code(signal.Signals[stop.signal]))
        except KeyboardInterrupt:
            click.echo("stopped by SIGINT; a run goes on from its last checkpoint with --resume", err=True)
            sys.exit(exit_code(signal.SIGINT))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sftk.__version__, prog_name="sftk")
def main() -> None:
    """Distil a video diffusion teacher into a fast, causal, streaming student."""


for command in (run, check, show, sample, export, data, fetch, plan, bench, doctor, slurm):
    main.add_command(command)
