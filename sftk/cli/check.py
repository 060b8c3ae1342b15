"""`sftk check`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sftk.cli.endings import ending
from sftk.errors import SftkError

if TYPE_CHECKING:
    from rich.console import Console

    from sftk.spec.recipe import Stage


@click.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE... [KEY.PATH=VALUE]...")
@click.option("--shapes", is_flag=True, help="Also run the whole training step on meta tensors.")
@click.option("--ranks", type=click.IntRange(1), help="Also check how so many processes would share weights and samples.")
@click.option("--node", type=click.IntRange(1), help="Of them on each node [default: all].")
def check(recipes: tuple[str, ...], shapes: bool, ranks: int | None, node: int | None) -> None:
    """Check structure, options, keys and model ports of each RECIPE, or of every run of a study, without loading a weight.

    Every mistake is reported at once, with its path and line; the exit code is then 2. Overrides hold for all recipes that are
    named; each has its own plugins only.
    """
    if "=" in recipes[0]:
        raise click.UsageError(f"no recipe is named before the override {recipes[0]!r}")
    names = [recipes[0], *filter(_is_file_name, recipes[1:])]
    overrides = tuple(argument for argument in recipes[1:] if not _is_file_name(argument))
    from rich.console import Console

    from sftk.core.plugins import scope

    console = Console(highlight=False)
    if len(names) == 1:
        _check(console, names[0], overrides, shapes, ranks, node)
        return
    failed: dict[str, int] = {}
    for name in names:
        try:
            with scope():
                _check(console, name, overrides, shapes, ranks, node)
        except SftkError as error:
            found = ending(error)
            assert found is not None
            message, failed[name] = found
            click.echo(f"{name}: {message}", err=True)
    if failed:
        click.echo(f"{len(failed)} of {len(names)} recipes failed: {', '.join(failed)}", err=True)
        sys.exit(max(failed.values()))


def _is_file_name(argument: str) -> bool:
    """Whether it is a further recipe; whatever else there is, is an override, or a mistake in one."""
    return "=" not in argument and argument.endswith((".yaml", ".yml"))


def _check(
    console: Console, recipe: str, overrides: tuple[str, ...], shapes: bool, ranks: int | None, node: int | None
) -> None:
    from sftk.runtime.evaluators import evaluation_problems
    from sftk.spec.recipe import find_document, is_study, load_recipe
    from sftk.spec.stores import check_stores
    from sftk.spec.study import load_study
    from sftk.spec.wording import counted

    if not is_study(find_document(recipe)[1]):
        stages = load_recipe(recipe, overrides, check=evaluation_problems)
        check_stores(stages)
        for stage in stages:
            with stage.plugins.again():
                _print(console, stage.name, stage, shapes)
                _print_ranks(console, stage, ranks, node)
        return
    study = load_study(recipe, overrides, check=evaluation_problems)
    check_stores(row.stage for row in study.rows)
    for row in study.rows:
        seeds = f"seed{'s' * (len(row.seeds) > 1)} {', '.join(map(str, row.seeds))}"
        with row.stage.plugins.again():
            _print(console, f"{row.name}, {seeds}", row.stage, shapes)
            _print_ranks(console, row.stage, ranks, node)
    runs = sum(len(row.seeds) for row in study.rows)
    console.print(f"{study.name}: ok: {counted(len(study.rows), 'row')}, {counted(runs, 'run')}")


def _print(console: Console, name: str, stage: Stage, shapes: bool) -> None:
    from sftk.spec.fetch import how_to_get, missing_files

    phases = ", ".join(f"{p.name} ({len(stage.graphs[p.name].nodes)} nodes)" for p in stage.recipe.phases)
    console.print(f"{name}: ok: {phases}", soft_wrap=True)
    for file in missing_files(stage):
        how = how_to_get(file.folder or file.name, stage.recipe.fetch)
        console.print(f"  not here yet: {file.name} ({', '.join(file.used_by)}); {how}", soft_wrap=True, markup=False)
    if shapes:
        _print_shapes(console, stage)


def _print_shapes(console: Console, stage: Stage) -> None:
    from sftk.runtime.shapes import check_shapes

    for found in check_shapes(stage):
        outputs = ", ".join(f"{key} {shape}" for key, shape in found.outputs.items())
        sizes = ", ".join(f"{role} {count / 1e6:.3f} M parameters" for role, count in found.parameters.items())
        console.print(f"  {found.phase}: updates {sizes}; returns {outputs}", soft_wrap=True)


def _print_ranks(console: Console, stage: Stage, ranks: int | None, node: int | None) -> None:
    from sftk.spec.rank_checks import check_ranks
    from sftk.spec.wording import counted, passes

    if ranks is None:
        return
    found = check_ranks(stage, ranks, node or ranks)
    held = ", ".join(f"{role} over {shards}" for role, shards in found.shards.items())
    split = passes(found.per_rank, found.accumulation, found.sequence)
    console.print(f"  {counted(ranks, 'rank')}: {split}; weights: {held}", soft_wrap=True)
