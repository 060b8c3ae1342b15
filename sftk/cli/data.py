"""`sftk data`: makes, converts and shows data sets."""

from __future__ import annotations

import click
from rich.console import Console

from sftk.runtime.prepare import prepare_recipe
from sftk.runtime.progress import TrainingProgress


@click.group()
def data() -> None:
    """Make, convert and show data sets."""


@data.command("ode-pairs")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def ode_pairs(recipe: str, overrides: tuple[str, ...]) -> None:
    """Make the ODE pairs that RECIPE trains on.

    Pairs that are there stay; it may be stopped and started again, and several of it may run at once.
    """
    with TrainingProgress(Console()) as progress:
        prepare_recipe(recipe, overrides, progress)
