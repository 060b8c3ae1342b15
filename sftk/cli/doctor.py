"""`sftk doctor`."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def doctor(recipe: str, overrides: tuple[str, ...]) -> None:
    """Say what RECIPE needs and what of it this machine has. The exit code is 1 when something is missing."""
    from sftk.runtime.doctor import examine
    from sftk.spec.recipe import load_recipe

    missing = 0
    for stage in load_recipe(recipe, overrides):
        click.echo(f"{stage.name}:")
        with stage.plugins.again():
            found = list(examine(stage))
        for finding in found:
            click.echo(f"  {finding.kind:8}{finding.text}")
        missing += sum(finding.kind == "missing" for finding in found)
    if missing:
        click.echo(f"{missing} missing")
        sys.exit(1)
