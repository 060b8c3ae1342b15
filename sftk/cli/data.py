"""`sftk data`: makes, converts and shows data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sftk.errors import SftkError


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
    from rich.console import Console

    from sftk.runtime.prepare import prepare_recipe
    from sftk.runtime.progress import TrainingProgress

    with TrainingProgress(Console()) as progress:
        prepare_recipe(recipe, overrides, progress)


def _size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    rows, cross, columns = value.partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal()):
        raise click.BadParameter(f"expected HEIGHTxWIDTH in pixels, such as 480x832, found {value!r}")
    return int(rows), int(columns)


def _choice(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    from sftk.spec.source import parse_yaml

    return parse_yaml(value, f"--{parameter.name}").value


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how much of one stage is done; the value is called with the count so far, from 0, and the total."""
    from rich.console import Console

    from sftk.runtime.progress import TrainingProgress

    with TrainingProgress(Console()) as progress:
        yield lambda done, total: progress.update(done) if done else progress.stage(name, total)


@data.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--codec", required=True, callback=_choice, help="A codec: its name, or '{use: NAME, with: {OPTION: VALUE}}'.")
@click.option("--frames", type=click.IntRange(1), required=True, help="Latent frames of a clip.")
@click.option("--size", required=True, callback=_size, metavar="HEIGHTxWIDTH", help="Of the pictures, in pixels.")
@click.option("--fps", type=click.FloatRange(0, min_open=True), help="Frames a second [default: every picture].")
@click.option("--captions", type=click.Path(path_type=Path), help="JSON lines [default: captions.jsonl in FOLDER].")
@click.option("--every-clip", is_flag=True, help="All clips of a video, not only the first.")
@click.option("--skip-bad", is_flag=True, help="Leave out videos that cannot be used, and list them.")
def encode(
    folder: Path,
    out: Path,
    codec: Any,
    frames: int,
    size: tuple[int, int],
    fps: float | None,
    captions: Path | None,
    every_clip: bool,
    skip_bad: bool,
) -> None:
    """Turn the videos in FOLDER into latents in the store OUT.

    A caption is the text file of the video's name, or a line of the caption file. Videos that are in the store stay.
    """
    from sftk.data.encode import Encoding, encode_folder

    encoding = Encoding(codec=codec, frames=frames, height=size[0], width=size[1], fps=fps, every_clip=every_clip)
    with _progress("encode") as report:
        found = encode_folder(folder, out, encoding, captions=captions, skip_bad=skip_bad, report=report)
    _list_bad(found.bad)
    click.echo(f"{out}: {found.clips} clips written, {found.there} videos were there already, {len(found.bad)} left out")


@data.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--text", required=True, callback=_choice, help="An embedder: its name, or '{use: NAME, with: {OPTION: VALUE}}'.")
@click.option("--negative", multiple=True, help="An unconditional prompt besides the empty one; may be repeated.")
@click.option("--first", type=click.IntRange(1), help="Only so many prompts from the beginning [default: all].")
@click.option("--format", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True, help="Of the stored rows.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Prompts written in one transaction.")
def embed(prompts: Path, out: Path, text: Any, negative: tuple[str, ...], first: int | None, format: Any, batch: int) -> None:
    """Embed PROMPTS into the store OUT, which the embedder `stored` reads.

    PROMPTS is a prompt file, a store of latents, or a folder of captioned images. Prompts that are in the store stay.
    """
    from sftk.data.embed import embed_prompts, prompts_of
    from sftk.data.prompts import first_prompts

    if not prompts.exists():
        raise SftkError(f"no such file or folder {prompts}")
    texts = ("", *negative, *first_prompts(prompts_of(prompts), first, prompts))
    with _progress("embed") as report:
        found = embed_prompts(texts, out, text, format=format, batch=batch, report=report)
    click.echo(f"{out}: {found.written} prompts embedded, {found.there} were there already")


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The contact sheet, a .png [default: PATH.png].")
@click.option("--codec", callback=_choice, help="Decodes the latents [default: what the store was encoded with].")
@click.option("--rows", type=click.IntRange(1), default=6, show_default=True, help="How many samples to show.")
@click.option("--skip-bad", is_flag=True, help="Go on after records that cannot be used, and list them.")
def inspect(path: Path, out: Path | None, codec: Any, rows: int, skip_bad: bool) -> None:
    """Say what PATH holds, and draw a contact sheet.

    PATH is a store of latents or of embeddings, a prompt file, or a folder of captioned images.
    """
    if not path.exists():
        raise SftkError(f"no such file or folder {path}")
    from sftk.runtime.inspect_data import inspect_data

    found = inspect_data(path, out or path.resolve().with_suffix(".png"), codec=codec, rows=rows, skip_bad=skip_bad)
    _list_bad(found.bad)
    click.echo("\n".join(found.lines))
    if found.sheet is not None:
        click.echo(f"contact sheet: {found.sheet}")


def _list_bad(bad: tuple[str, ...]) -> None:
    for reason in bad:
        click.echo(f"left out: {reason}", err=True)
    if bad:
        click.echo(f"{len(bad)} left out", err=True)
