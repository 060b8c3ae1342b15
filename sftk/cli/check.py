"""`sftk check`."""

from __future__ import annotations

import click
from rich.console import Console

from sftk.runtime.evaluators import evaluation_problems
from sftk.runtime.shapes import check_shapes
from sftk.spec.fetch import how_to_get, missing_files
from sftk.spec.recipe import Stage, find_document, is_study, load_recipe
from sftk.spec.study import load_study


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--shapes", is_flag=True, help="Also run the whole training step on meta tensors.")
def check(recipe: str, overrides: tuple[str, ...], shapes: bool) -> None:
    """Check structure, options, keys and model ports of RECIPE, or of every run of a study, without loading a weight.

    Every mistake is reported at once, with its path and line; the exit code is then 2.
    """
    console = Console(highlight=False)
    if not is_study(find_document(recipe)[1]):
        for stage in load_recipe(recipe, overrides, check=evaluation_problems):
            _print(console, stage.name, stage, shapes)
        return
    study = load_study(recipe, overrides, check=evaluation_problems)
    for row in study.rows:
        seeds = f"seed{'s' * (len(row.seeds) > 1)} {', '.join(map(str, row.seeds))}"
        _print(console, f"{row.name}, {seeds}", row.stage, shapes)
    runs = sum(len(row.seeds) for row in study.rows)
    console.print(f"{study.name}: ok: {len(study.rows)} row{'s' * (len(study.rows) > 1)}, {runs} run{'s' * (runs > 1)}")


def _print(console: Console, name: str, stage: Stage, shapes: bool) -> None:
    phases = ", ".join(f"{p.name} ({len(stage.graphs[p.name].nodes)} nodes)" for p in stage.recipe.phases)
    console.print(f"{name}: ok: {phases}", soft_wrap=True)
    for file in missing_files(stage):
        how = how_to_get(file.folder or file.name, stage.recipe.fetch)
        console.print(f"  not here yet: {file.name} ({', '.join(file.used_by)}); {how}", soft_wrap=True, markup=False)
    for found in check_shapes(stage) if shapes else ():
        outputs = ", ".join(f"{key} {shape}" for key, shape in found.outputs.items())
        sizes = ", ".join(f"{role} {count / 1e6:.3f} M parameters" for role, count in found.parameters.items())
        console.print(f"  {found.phase}: updates {sizes}; returns {outputs}", soft_wrap=True)
