"""`sftk check`."""

from __future__ import annotations

import click
from rich.console import Console

from sftk.runtime.evaluators import evaluation_problems
from sftk.runtime.shapes import check_shapes
from sftk.spec.fetch import how_to_get, missing_files
from sftk.spec.rank_checks import check_ranks
from sftk.spec.recipe import Stage, find_document, is_study, load_recipe
from sftk.spec.study import load_study


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--shapes", is_flag=True, help="Also run the whole training step on meta tensors.")
@click.option("--ranks", type=click.IntRange(1), help="Also check how so many processes would share weights and samples.")
@click.option("--node", type=click.IntRange(1), help="Of them on each node [default: all].")
def check(recipe: str, overrides: tuple[str, ...], shapes: bool, ranks: int | None, node: int | None) -> None:
    """Check structure, options, keys and model ports of RECIPE, or of every run of a study, without loading a weight.

    Every mistake is reported at once, with its path and line; the exit code is then 2.
    """
    console = Console(highlight=False)
    if not is_study(find_document(recipe)[1]):
        for stage in load_recipe(recipe, overrides, check=evaluation_problems):
            _print(console, stage.name, stage, shapes)
            _print_ranks(console, stage, ranks, node)
        return
    study = load_study(recipe, overrides, check=evaluation_problems)
    for row in study.rows:
        seeds = f"seed{'s' * (len(row.seeds) > 1)} {', '.join(map(str, row.seeds))}"
        _print(console, f"{row.name}, {seeds}", row.stage, shapes)
        _print_ranks(console, row.stage, ranks, node)
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


def _print_ranks(console: Console, stage: Stage, ranks: int | None, node: int | None) -> None:
    if ranks is None:
        return
    found = check_ranks(stage, ranks, node or ranks)
    held = ", ".join(f"{role} over {shards}" for role, shards in found.shards.items())
    passes = f"{found.per_rank} sample{'s' * (found.per_rank > 1)} in a pass, {found.accumulation} in an update"
    together = f", {found.sequence} share each" if found.sequence > 1 else ""
    console.print(f"  {ranks} rank{'s' * (ranks > 1)}: {passes}{together}; weights: {held}", soft_wrap=True)
