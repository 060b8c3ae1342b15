"""`sftk data`: makes, converts and shows data sets."""

from __future__ import annotations

import click
from rich.console import Console

from sftk.errors import SpecError
from sftk.runtime.evaluators import evaluation_problems
from sftk.runtime.prepare import PREPARERS, prepare_data
from sftk.runtime.progress import TrainingProgress
from sftk.spec.recipe import load_recipe


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
    stages = load_recipe(recipe, overrides, check=evaluation_problems)
    asking = [stage for stage in stages if stage.recipe.data.use in PREPARERS]
    if not asking:
        found = ", ".join(sorted({stage.recipe.data.use for stage in stages}))
        raise SpecError(f"{recipe} reads {found}; expected data: {{use: ode_pairs, ...}}")
    with TrainingProgress(Console()) as progress:
        for stage in asking:
            prepare_data(stage, progress)
