"""The `sftk` command."""

from sftk.cli.main import main

__all__ = ["main"]
