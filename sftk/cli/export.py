"""`sftk export`."""

from __future__ import annotations

from pathlib import Path

import click

DTYPES = ("bf16", "fp16", "fp32", "fp64")
"""Of `sftk.models.weights`; here, too, so that a usage error needs no torch."""


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--role", help="Which model of the run [default: its student]; its average where one is kept.")
@click.option("--last", is_flag=True, help="The last weights themselves, not their average.")
@click.option(
    "--format",
    type=click.Choice(["sftk", "original", "diffusers"]),
    default="sftk",
    show_default=True,
    help="One safetensors file of ours, or a folder as Wan publishes it or as diffusers loads it.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast the weights [default: as they are].")
@click.option(
    "--shard-size",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="GB above which a folder's weights are split into several files with an index.",
)
def export(
    checkpoint: Path, out: Path, role: str | None, last: bool, format: str, dtype: str | None, shard_size: float
) -> None:
    """Write a trained model's weights, or convert weights from one format to another.

    CHECKPOINT is a run's folder, one of its checkpoints, or weights: a safetensors file, a folder of the original Wan or of
    diffusers, or a PyTorch file (file.pt:entry).
    """
    from sftk.models import weights as saved
    from sftk.models.export import export_weights
    from sftk.models.formats import open_weights
    from sftk.runtime.inference import find_weights

    weights = find_weights(checkpoint, role=role, average=not last)
    source = open_weights(weights)
    files = export_weights(
        source,
        out,
        format=format,  # pyright: ignore[reportArgumentType]
        dtype=saved.DTYPES[dtype] if dtype else None,
        shard_bytes=round(shard_size * 1e9),
    )
    size = sum(file.stat().st_size for file in files) / 1e6
    parts = f", {len(files)} files" if len(files) > 1 else ""
    click.echo(f"{out}: {weights} in the {format} format as {dtype or 'it is'} ({size:.1f} MB{parts})")
