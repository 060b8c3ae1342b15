"""Folders of weights: which files belong to the transformer, and whether index and shards agree."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from sftk.errors import CheckpointError
from sftk.models.tensor_files import Stored, read_safetensors

STEM = "diffusion_pytorch_model"
"""How Wan and diffusers call a transformer's files."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def transformer_folder(path: Path) -> Path:
    """The folder that holds a transformer's files: the given one, or `transformer` in a diffusers pipeline.

    Raises:
        CheckpointError: neither holds any; the message lists what is there.
    """
    for folder in (path, path / "transformer"):
        if any(folder.glob(f"{STEM}*.safetensors")) or any(folder.glob(f"{STEM}*.index.json")):
            return folder
    there = _contents(path)
    inside = sorted({str(file.parent.relative_to(path)) for file in path.glob(f"*/{STEM}*.safetensors")})
    if inside:
        hint = f"name one of {', '.join(inside)} in it"
    elif (path / "recipe.yaml").is_file():
        hint = "this is a run; name a weight file in its checkpoints/"
    elif files := [name for name in there if name.endswith((".safetensors", ".pt", ".pth"))]:
        hint = f"to take a file, name it: {path / files[0]}"
    else:
        hint = "name the folder of a Wan 2.1 transformer"
    raise CheckpointError(f"{path} holds no {STEM}*.safetensors, only {shown_contents(path)}; {hint}")


def shown_contents(folder: Path) -> str:
    """What a folder holds, for a message: the first names, and how many more there are.

    Example:
        >>> import tempfile
        >>> shown_contents(Path(tempfile.mkdtemp()))
        'nothing'
    """
    there = _contents(folder)
    return (", ".join(there[:8]) or "nothing") + (f" and {len(there) - 8} more" if len(there) > 8 else "")


def _contents(folder: Path) -> list[str]:
    found = (item for item in folder.iterdir() if not item.name.startswith("."))
    return sorted(f"{item.name}/" if item.is_dir() else item.name for item in found)


def read_folder(folder: Path, stem: str = STEM) -> dict[str, Stored]:
    """The tensors of a folder, by the names that they have there, shard by shard.

    Args:
        stem: how the files' names begin.

    Raises:
        CheckpointError: a file is missing or broken, or the index and the shards disagree; the message names file and key.
    """
    index = _one(folder, sorted(folder.glob(f"{stem}*.index.json")), stem)
    if index is not None:
        return _indexed(folder, index)
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    matches = [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    if not matches:
        only = _one(folder, files, stem)
        assert only is not None
        return read_safetensors(only)[0]
    counts = {(match[1], match[3]) for match in matches}
    if len(counts) > 1 or len(matches) < len(files):
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder} holds files of different sets: {names}; keep one set, or add its index")
    stem, count = counts.pop()
    return _merge(folder, [folder / f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with a mapping in it.

    Raises:
        CheckpointError: it cannot be read as one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def holds_config(folder: Path, others: Container[str]) -> bool:
    """Whether a folder has a config.json that is not of one of the other classes (Wan's own folders hold the backbone's).

    Raises:
        CheckpointError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text('{"_class_name": "WanModel"}')
        >>> holds_config(folder, ()), holds_config(folder, ("WanModel",))
        (True, False)
    """
    file = folder / "config.json"
    return file.is_file() and str(read_json(file).get("_class_name")) not in others


def _one(folder: Path, files: list[Path], stem: str) -> Path | None:
    """The only file, or the one without a variant in its name."""
    if len(files) < 2:
        return files[0] if files else None
    plain = [file for file in files if file.name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json")]
    if plain:
        return plain[0]
    raise CheckpointError(f"{folder} holds several sets of weights: {', '.join(f.name for f in files)}; name one file")


def _merge(folder: Path, files: list[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks the shard {file.name} of {len(files)}; copy it again")
        for name, stored in read_safetensors(file)[0].items():
            if name in found:
                raise CheckpointError(
                    f"{name} is in two shards of {folder}, {found[name].file.name} and {file.name}; the shards are of "
                    "different sets: copy the folder again"
                )
            found[name] = stored
    return found


def _indexed(folder: Path, index: Path) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no `weight_map`; expected tensor name to shard: copy it again")
    found = _merge(folder, [folder / name for name in sorted(set(where.values()))])
    for name, file in where.items():
        if name not in found:
            raise CheckpointError(f"{index} says that {name} is in {file}, but no shard holds it; {_AGAIN}")
        if found[name].file.name != file:
            raise CheckpointError(f"{index} says that {name} is in {file}, found it in {found[name].file.name}; {_AGAIN}")
    extra = next((stored for name, stored in found.items() if name not in where), None)
    if extra is not None:
        raise CheckpointError(f"{extra.file} holds {extra.name}, which {index.name} does not list; {_AGAIN}")
    return found


_AGAIN = "index and shards are of different sets: copy the folder again"
