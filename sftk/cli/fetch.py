"""`sftk fetch`."""

from __future__ import annotations

import click


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--run", is_flag=True, help="Download with huggingface_hub instead of printing the commands.")
@click.option("--all", "everything", is_flag=True, help="Also what is here already.")
def fetch(recipe: str, overrides: tuple[str, ...], run: bool, everything: bool) -> None:
    """Print the commands that download or make what RECIPE needs and what is not here.

    With --run the downloads are made; commands that make data are left to you.
    """
    from sftk.runtime.download import downloads, run_download
    from sftk.spec.recipe import load_recipe

    found = downloads(load_recipe(recipe, overrides), everything=everything)
    if not found:
        click.echo("nothing to download")
    for download in found:
        click.echo(download.command)
        if run and download.downloads:
            click.echo(f"  downloaded into {run_download(download)}")
