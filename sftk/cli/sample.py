"""`sftk sample`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sftk.errors import SftkError

if TYPE_CHECKING:
    from sftk.runtime.sample_files import Clip
    from sftk.runtime.sampler import Sampler

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--prompt", "prompts", multiple=True, help="What to show; may be given several times.")
@click.option("--prompts", "prompt_file", type=FILE, help="A file of prompts, one a line; # begins a comment.")
@click.option("--extended", type=FILE, help="A file of longer prompts, line by line, that are embedded instead.")
@click.option(
    "--out",
    "-o",
    type=FILE,
    default=Path("sample.mp4"),
    show_default=True,
    help="An .mp4, .gif, .png (contact sheet) or .safetensors (latents only); several videos are numbered.",
)
@click.option("--frames", type=click.IntRange(1), help="Latent frames to make [default: as in training].")
@click.option("--seed", "seeds", type=int, multiple=True, help="One for each video, or the first's [default: 0].")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Videos that are made together.")
@click.option("--role", help="Which model of the run or recipe [default: its student].")
@click.option(
    "--weights",
    type=FILE,
    help="Weights of another place for it: a safetensors file, a folder of Wan or diffusers, or a file.pt:entry.",
)
@click.option("--image", "images", type=FILE, multiple=True, help="Begin with a picture; one, or one for each video.")
@click.option("--video", type=FILE, help="Go on from the end of a video.")
@click.option("--initial", type=FILE, help="Go on from latents that --latents wrote.")
@click.option("--keep", type=click.IntRange(1), help="Latent frames of --video or --initial to go on from.")
@click.option("--latents", is_flag=True, help="Write latents beside the videos, as .safetensors.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what was made and what it took as JSON.")
def sample(
    model: Path,
    overrides: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    extended: Path | None,
    out: Path,
    frames: int | None,
    seeds: tuple[int, ...],
    batch: int,
    role: str | None,
    weights: Path | None,
    images: tuple[Path, ...],
    video: Path | None,
    initial: Path | None,
    keep: int | None,
    latents: bool,
    device: str,
    as_json: bool,
) -> None:
    """Write videos from a model, block by block as they are made.

    MODEL is a run's folder, one of its checkpoints, a weight file in one, or a recipe, whose own weights are taken or those of
    --weights. Anything about sampling can be changed: `sampling.steps=[1000, 500]`, `sampling.window=21`, `precision=bf16`.
    """
    if not prompts and prompt_file is None:
        raise click.UsageError("nothing to show: give --prompt TEXT or --prompts FILE")
    if sum(map(bool, (images, video, initial))) > 1:
        raise click.UsageError("--image, --video and --initial each say what videos begin with; give one of them")
    if keep is not None and not (video or initial):
        raise click.UsageError("--keep is for --video and --initial")
    from sftk.runtime.device import pick_device
    from sftk.runtime.inference import load_sampler
    from sftk.runtime.sample_files import write_samples

    clips = _clips(prompts, prompt_file, extended, seeds, out)
    if len(images) not in (0, 1, len(clips)):
        raise SftkError(f"{len(images)} pictures for {len(clips)} videos; give one for all, or one for each")
    sampler = load_sampler(model, overrides, role=role, device=pick_device(device), weights=weights)
    found = write_samples(
        sampler,
        clips,
        batch=batch,
        frames=frames,
        initial=_start(sampler, images, video, initial, keep),
        latents=latents,
        note=(lambda text: None) if as_json else click.echo,
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if found["frames_per_second"] is not None:
        latency, speed = found["first_block_latency"], found["frames_per_second"]
        memory, seconds = found["peak_memory_bytes"]["total"] / 1e9, found["seconds"]["total"]
        click.echo(
            f"{seconds:.1f} s in all: first frames after {latency:.2f} s of sampling, {speed:.1f} frames a second, "
            f"peak memory {memory:.2f} GB"
        )


def _clips(
    prompts: tuple[str, ...], prompt_file: Path | None, extended: Path | None, seeds: tuple[int, ...], out: Path
) -> list[Clip]:
    """The videos that are asked for: each prompt once, or one prompt with each of several seeds."""
    from sftk.data.prompts import read_extended, read_prompts
    from sftk.runtime.sample_files import Clip, clip_files
    from sftk.runtime.sampler import spread_seeds

    found = (*prompts, *(() if prompt_file is None else read_prompts(prompt_file)))
    texts = found if extended is None else read_extended(extended, found, prompt_file or "the command line")
    if len(found) == 1 and len(seeds) > 1:
        found, texts = found * len(seeds), texts * len(seeds)
    spread = spread_seeds(len(found), seeds or (0,))
    return [
        Clip(prompt=prompt, text=text, seed=seed, path=path)
        for prompt, text, seed, path in zip(found, texts, spread, clip_files(out, len(found)), strict=True)
    ]


def _start(
    sampler: Sampler, images: tuple[Path, ...], video: Path | None, initial: Path | None, keep: int | None
) -> Callable[[], Any] | None:
    """What gives the latents that the videos begin with, or None."""
    import torch

    from sftk.runtime.starts import image_latents, read_latents, video_latents

    if images:
        return lambda: torch.cat([image_latents(sampler, path) for path in images])
    if video is not None:
        return functools.partial(video_latents, sampler, video, keep)
    size = sampler.options.latents
    return None if initial is None else functools.partial(read_latents, initial, keep, (size.channels, size.height, size.width))
