"""Weights of a backbone wherever they come from: the format is found out, names become the original ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
from torch import Tensor

from sftk.errors import CheckpointError
from sftk.models.config import WanConfig
from sftk.models.config_files import check_architecture, geometry, told_by_json
from sftk.models.names import is_diffusers, rename, unwrap
from sftk.models.shard_files import read_shards
from sftk.models.tensor_files import PICKLES, Stored, read_pickle, split_entry, stream
from sftk.models.weight_folders import read_folder, read_json, transformer_folder

_EXPECTED = "a .safetensors or .pt file, or the folder of a transformer"
Format = Literal["sftk", "original", "diffusers"]


@attrs.frozen(kw_only=True, eq=False)
class WeightSource:
    """Weights that lie in files: what is known before a value is read.

    Args:
        path: as the user gave it.
        format: whose names and config they have; those of training checkpoints (.pt) are `original`.
        stored: parameter name (the original one) to where it lies.
        settings: what the config.json beside them says, or None.
        settings_path: of that file.
        own_config: the config in the metadata of a file of ours, or None.
    """

    path: Path
    format: Format
    stored: dict[str, Stored]
    settings: Mapping[str, Any] | None = None
    settings_path: Path
    own_config: Mapping[str, Any] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return {name: stored.shape for name, stored in self.stored.items()}

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(stored.bytes for stored in self.stored.values())

    def tensors(self, rows: Mapping[str, slice | None] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Parameter name and value, one by one in the files' order; see `stream`.

        Args:
            rows: parameter name to the rows that are wanted; those without any are left out.
        """
        names = {(stored.file, stored.name): name for name, stored in self.stored.items()}
        wanted = rows or {}
        for stored, tensor in stream(self.stored.values(), lambda item: wanted.get(names[item.file, item.name])):
            yield names[stored.file, stored.name], tensor

    def check_backbone(self) -> None:
        """That these are a backbone's weights.

        Raises:
            CheckpointError: they are another model's.
        """
        if self.settings is not None:
            told_by_json(self.settings, self.settings_path)
        check_architecture(self.stored, self.path)

    def config(self) -> WanConfig:
        """The backbone's size.

        Raises:
            CheckpointError: these are another model's weights, or do not tell it.
        """
        if self.own_config is not None:
            try:
                values = {**self.own_config, "patch_size": tuple(self.own_config["patch_size"])}
                return WanConfig(**values)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.path} holds the config of something else than a backbone: {error}") from error
        self.check_backbone()
        return geometry(self.shapes, self.settings, self.path, self.settings_path)


def open_weights(path: Path) -> WeightSource:
    """Finds out what lies at a path; reads names and shapes, no values.

    Args:
        path: a safetensors file, or that of any rank where several wrote parts; a folder of the original Wan or of diffusers
            (the transformer's, or the pipeline's); or a PyTorch file, `file.pt` or `file.pt:<entry>`.

    Raises:
        CheckpointError: there is nothing, something is broken, or index and shards disagree.

    Example:
        >>> import tempfile
        >>> from sftk.models import WanModel, preset
        >>> from sftk.models.weights import save_weights
        >>> file = Path(tempfile.mkdtemp()) / "digits.safetensors"
        >>> save_weights(WanModel(preset("digits")), file)
        >>> source = open_weights(file)
        >>> source.format, source.config() == preset("digits"), source.shapes["head.modulation"]
        ('sftk', True, (1, 2, 96))
    """
    file, entry = split_entry(path)
    if file.name.endswith(".index.json") and file.is_file():
        file = file.parent
    own: Mapping[str, Any] | None = None
    folder = file.parent
    if not file.exists():
        raise CheckpointError(f"no weight file {file}; expected {_EXPECTED}")
    if file.is_dir():
        folder = transformer_folder(file)
        stored = read_folder(folder)
    elif file.suffix in PICKLES:
        stored = read_pickle(file, entry)
    else:
        try:
            stored, metadata = read_shards(file)
        except CheckpointError as error:
            if file.suffix == ".safetensors":
                raise
            raise CheckpointError(f"{file} is no weight file; expected {_EXPECTED}") from error
        if {"config", "role"} & set(metadata):
            own = json.loads(metadata["config"]) if "config" in metadata else None
            return WeightSource(path=path, format="sftk", stored=stored, settings_path=file, own_config=own)
    beside = folder / "config.json"
    settings = read_json(beside) if beside.is_file() and file.suffix not in PICKLES else None
    if file.is_dir() and settings is None:
        raise CheckpointError(f"{folder} has no config.json, which tells the model's size; copy it there, too")
    naming: Format = "diffusers" if is_diffusers(map(unwrap, stored)) else "original"
    return WeightSource(
        path=path, format=naming, stored=_original_names(stored, naming, path), settings=settings, settings_path=beside
    )


def _original_names(stored: Mapping[str, Stored], naming: Format, path: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, item in stored.items():
        ours = unwrap(name)
        ours = rename(ours, "original") if naming == "diffusers" else ours
        if ours in found:
            raise CheckpointError(f"{path} holds {ours} twice, as {found[ours].name} and as {name}; keep one of them")
        found[ours] = item
    return found
