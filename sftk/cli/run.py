"""`sftk run`."""

from __future__ import annotations

from pathlib import Path

import click

from sftk.runtime.run import run_recipe
from sftk.runtime.study import run_study
from sftk.spec.recipe import find_document, is_study


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="The run's folder [default: runs/<recipe>/<time>; of a study runs/<study>].",
)
@click.option(
    "--resume", is_flag=True, help="Go on from the last checkpoint; without one, start afresh. A study goes on without it, too."
)
@click.option("--jobs", "-j", type=click.IntRange(1), help="Of a study: most runs at a time [default: 1].")
def run(recipe: str, overrides: tuple[str, ...], run_dir: Path | None, resume: bool, jobs: int | None) -> None:
    """Train what RECIPE says, evaluate it and write a report.

    RECIPE is looked up in the working directory, then in the package: `sftk run recipes/dmd.yaml train.steps=100`.
    It may also be a study, a file with a `matrix` of recipes, which are then run side by side.
    """
    if is_study(find_document(recipe)[1]):
        run_study(recipe, overrides, run_dir=run_dir, jobs=jobs or 1)
    elif jobs is not None:
        raise click.UsageError("--jobs is for studies; this recipe is one run")
    else:
        run_recipe(recipe, overrides, run_dir=run_dir, resume=resume)
