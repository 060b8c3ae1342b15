"""`sftk check`."""

from __future__ import annotations

import click
from rich.console import Console

from sftk.runtime.evaluators import evaluation_problems
from sftk.runtime.shapes import check_shapes
from sftk.spec.recipe import load_recipe


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--shapes", is_flag=True, help="Also run the whole training step on meta tensors.")
def check(recipe: str, overrides: tuple[str, ...], shapes: bool) -> None:
    """Check structure, options, keys and model ports of RECIPE without loading a weight.

    Every mistake is reported at once, with its path and line; the exit code is then 2.
    """
    console = Console(highlight=False)
    for stage in load_recipe(recipe, overrides, check=evaluation_problems):
        phases = ", ".join(f"{p.name} ({len(stage.graphs[p.name].nodes)} nodes)" for p in stage.recipe.phases)
        console.print(f"{stage.name}: ok: {phases}", soft_wrap=True)
        for found in check_shapes(stage) if shapes else ():
            outputs = ", ".join(f"{key} {shape}" for key, shape in found.outputs.items())
            sizes = ", ".join(f"{role} {count / 1e6:.3f} M parameters" for role, count in found.parameters.items())
            console.print(f"  {found.phase}: updates {sizes}; returns {outputs}", soft_wrap=True)
