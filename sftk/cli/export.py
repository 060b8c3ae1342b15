"""`sftk export`."""

from __future__ import annotations

from pathlib import Path

import click

from sftk.models.weights import DTYPES, save_weights
from sftk.runtime.inference import load_student


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--role", help="Which model of the run [default: its student]; its average where one is kept.")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="fp32", show_default=True)
def export(checkpoint: Path, out: Path, role: str | None, dtype: str) -> None:
    """Write a trained model's weights to one safetensors file, under their original names."""
    student = load_student(checkpoint, role=role)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(student.port.module, out, dtype=DTYPES[dtype])
    click.echo(f"{out}: {student.weights} as {dtype} ({out.stat().st_size / 1e6:.1f} MB)")
