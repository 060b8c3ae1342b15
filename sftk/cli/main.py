"""Entry point: groups the commands and turns errors into messages and exit codes.

The modules of the commands import what they run inside their functions, so that help, the version and usage errors come at
once, without torch.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from sftk import __version__
from sftk.cli.bench import bench
from sftk.cli.check import check
from sftk.cli.data import data
from sftk.cli.doctor import doctor
from sftk.cli.endings import ending
from sftk.cli.export import export
from sftk.cli.fetch import fetch
from sftk.cli.plan import plan
from sftk.cli.run import run
from sftk.cli.sample import sample
from sftk.cli.show import show
from sftk.cli.slurm import slurm


class Commands(click.Group):
    """A group whose commands end with one clear message instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; `ending` says how it ends when it fails."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            found = ending(error)
            if found is None:
                raise
            message, code = found
            click.echo(message, err=True)
            sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sftk")
def main() -> None:
    """Distil a video diffusion teacher into a few-step, causal, streaming student."""


for command in (run, check, show, sample, export, data, fetch, plan, bench, doctor, slurm):
    main.add_command(command)
