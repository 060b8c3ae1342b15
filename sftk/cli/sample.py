"""`sftk sample`."""

from __future__ import annotations

from pathlib import Path

import click

from sftk.errors import SftkError
from sftk.runtime.device import pick_device
from sftk.runtime.inference import load_student
from sftk.runtime.media import can_write_mp4, contact_sheet, write_gif, write_mp4

WRITERS = {".mp4", ".gif", ".png"}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to show; may be given several times.")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("sample.mp4"),
    show_default=True,
    help="An .mp4, .gif or .png (contact sheet); several prompts are numbered.",
)
@click.option("--frames", type=click.IntRange(1), help="Latent frames [default: as in training].")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--role", help="Which model of the run [default: its student].")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Weights of another place for it: a safetensors file, a folder of Wan or diffusers, or a file.pt:entry.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def sample(
    checkpoint: Path,
    prompts: tuple[str, ...],
    out: Path,
    frames: int | None,
    seed: int,
    role: str | None,
    weights: Path | None,
    device: str,
) -> None:
    """Write a video from a trained student, with its few-step cached rollout.

    CHECKPOINT is a run's folder, one of its checkpoints, or a weight file in one; with --weights also a recipe.
    """
    if out.suffix not in WRITERS:
        raise SftkError(f"cannot write {out.name!r}; expected a name that ends in {', '.join(sorted(WRITERS))}")
    if out.suffix == ".mp4" and not can_write_mp4():
        raise SftkError("writing MP4 needs PyAV (pip install av); or take a name that ends in .gif")
    student = load_student(checkpoint, role=role, device=pick_device(device), weights=weights)
    videos = student.sample(prompts, frames=frames, seed=seed)
    for index, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        path = out if len(prompts) == 1 else out.with_stem(f"{out.stem}_{index}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            write_mp4(path, video, student.data.fps)
        elif path.suffix == ".gif":
            write_gif(path, video, student.data.fps)
        else:
            contact_sheet(path, [(prompt, video)])
        click.echo(f"{path}: {prompt} ({len(video)} frames, seed {seed}, {student.weights})")
