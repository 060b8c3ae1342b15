"""Weights out to the formats of others, tensor by tensor: the original Wan's, diffusers', and our own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor

from sftk.errors import CheckpointError
from sftk.models.config_files import config_json
from sftk.models.formats import Format, WeightSource
from sftk.models.names import rename
from sftk.models.weight_folders import STEM

SHARD_BYTES = 5_000_000_000
"""Size above which a folder's weights are split, as in the published Wan folders."""


def export_weights(
    source: WeightSource, out: Path, *, format: Format, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes weights in a format; what is written appears whole or not at all.

    Holds at most one shard in memory (`sftk`: all of it).

    Args:
        source: from `open_weights`.
        out: a folder for `original` and `diffusers`, a .safetensors file for `sftk`.
        format: `sftk`, one file with the config in its metadata; `original`, the folder that Wan publishes; `diffusers`, what
            `WanTransformer3DModel.from_pretrained` loads.
        dtype: cast to it; None keeps the weights' own.
        shard_bytes: size above which a folder is split into several files with an index.

    Returns:
        The files with weights.

    Raises:
        CheckpointError: there is something at `out`, or the format cannot express the model.

    Example:
        >>> import tempfile
        >>> from sftk.models import WanConfig, WanModel
        >>> from sftk.models.formats import open_weights
        >>> from sftk.models.weights import save_weights
        >>> folder = Path(tempfile.mkdtemp())
        >>> model = WanModel(WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, freq_dim=8))
        >>> save_weights(model, folder / "ours.safetensors")
        >>> files = export_weights(open_weights(folder / "ours.safetensors"), folder / "theirs", format="diffusers")
        >>> sorted(file.name for file in (folder / "theirs").iterdir())
        ['config.json', 'diffusion_pytorch_model.safetensors']
    """
    return _write_file(source, out, dtype) if format == "sftk" else _write_folder(source, out, format, dtype, shard_bytes)


def _write_file(source: WeightSource, out: Path, dtype: torch.dtype | None) -> list[Path]:
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder; the sftk format is one file: name it, such as {out / 'model.safetensors'}")
    config = source.own_config if source.own_config is not None else attrs.asdict(source.config())
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.writing")
    tensors = {name: _copy(tensor, dtype) for name, tensor in source.tensors()}
    save_file(tensors, temporary, metadata={"config": json.dumps(config)})
    os.replace(temporary, out)
    return [out]


def _write_folder(source: WeightSource, out: Path, format: Format, dtype: torch.dtype | None, limit: int) -> list[Path]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; remove it, or name a new folder")
    values = config_json(source.config(), format, out)
    temporary = out.with_name(f".{out.name}.writing")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    shards = list(_shards(source, dtype, limit))
    where: dict[str, str] = {}
    tensors = source.tensors()
    for number, names in enumerate(shards, 1):
        file = f"{STEM}.safetensors" if len(shards) == 1 else f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        part: dict[str, Tensor] = {}
        for _ in names:
            name, tensor = next(tensors)
            part[rename(name, "diffusers") if format == "diffusers" else name] = _copy(tensor, dtype)
        save_file(part, temporary / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if len(shards) > 1:
        total = sum(_size(item.shape, item.bytes, dtype) for item in source.stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (temporary / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        out.rmdir()
    os.replace(temporary, out)
    return [out / file for file in dict.fromkeys(where.values())]


def _shards(source: WeightSource, dtype: torch.dtype | None, limit: int) -> Iterator[list[str]]:
    """Names in the order in which they are read, cut before a shard grows over the limit."""
    names: list[str] = []
    filled = 0
    for name, item in source.stored.items():
        size = _size(item.shape, item.bytes, dtype)
        if names and filled + size > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _size(shape: tuple[int, ...], own: int, dtype: torch.dtype | None) -> int:
    return own if dtype is None else torch.Size(shape).numel() * dtype.itemsize


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A contiguous copy, which outlives the file's mapping."""
    return tensor.to(dtype if tensor.is_floating_point() else None, copy=True, memory_format=torch.contiguous_format)
