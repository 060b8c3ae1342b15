"""`sftk run`."""

from __future__ import annotations

from pathlib import Path

import click

from sftk.runtime.run import run_recipe


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="The run's folder [default: runs/<recipe>/<time>].")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; without one, start afresh.")
def run(recipe: str, overrides: tuple[str, ...], run_dir: Path | None, resume: bool) -> None:
    """Train what RECIPE says, evaluate it and write a report.

    RECIPE is looked up in the working directory, then in the package: `sftk run recipes/dmd.yaml train.steps=100`.
    """
    run_recipe(recipe, overrides, run_dir=run_dir, resume=resume)
