"""Weight files of other projects, memory-mapped: a file, or a folder with `config.json`, shards and their index."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sftk.errors import CheckpointError, SftkError

_LISTED = 12
_ZIP = b"PK"


def import_extra(module: str, purpose: str) -> Any:
    """A module of the `wan` extra.

    Raises:
        SftkError: it is not installed.

    Example:
        >>> import_extra("transformerz", "the text encoder")
        Traceback (most recent call last):
        sftk.errors.SftkError: the text encoder needs the package 'transformerz'; install it with `pip install 'sftk[wan]'`
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SftkError(f"{purpose} needs the package {package!r}; install it with `pip install 'sftk[wan]'`") from error


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth` file that holds one state dict, mapped from the disk.

    Raises:
        CheckpointError: see `map_safetensors` and `map_pickle`.
    """
    return map_safetensors(path) if path.suffix == ".safetensors" else map_pickle(path)


def map_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file that holds one state dict, mapped from the disk. No code in the file is run.

    Raises:
        CheckpointError: it is missing, truncated, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}")
    try:
        with path.open("rb") as file:
            archive = file.read(len(_ZIP)) == _ZIP
        # What PyTorch wrote before 1.6 cannot be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors; it is not loaded, since that runs code in it") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a whole PyTorch file; download it again: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds {type(found).__name__}, not a state dict; expected tensors by name")
    return found


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from the disk.

    Raises:
        CheckpointError: it is missing or truncated.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"weight": torch.ones(2)}, file)
        >>> map_safetensors(file)
        {'weight': tensor([1., 1.])}
    """
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file; download it again: {error}") from error


def map_folder(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder: one file, or the shards that its index lists.

    Args:
        stem: name of the weight files, `model` (transformers) or `diffusion_pytorch_model` (diffusers).

    Raises:
        CheckpointError: there is no such file, a shard is missing or broken, or the index and the shards disagree.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if not single.is_file():
            present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise CheckpointError(f"{folder} holds no {single.name} and no {index.name}; it holds {present}")
        return map_safetensors(single)
    places: dict[str, str] = read_json(index).get("weight_map", {})
    shards = {name: map_safetensors(folder / name) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in shards[name]:
            raise CheckpointError(f"{index} says that {key} is in {name}, which lacks it; the files are of different downloads")
    for name, tensors in shards.items():
        for key in tensors:
            if places.get(key) != name:
                raise CheckpointError(f"{folder / name} holds {key}, which {index.name} does not place there")
    return {key: shards[name][key] for key, name in places.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping.

    Raises:
        CheckpointError: it is missing or no JSON mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"no file {path}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a mapping")
    return value


def assign_weights(module: nn.Module, found: Mapping[str, Tensor], where: Path) -> None:
    """Makes tensors the parameters of a module that was built on the meta device; nothing is copied.

    Raises:
        CheckpointError: names or shapes differ; the message lists them.

    Example:
        >>> with torch.device("meta"):
        ...     linear = nn.Linear(2, 1)
        >>> assign_weights(linear, {"weight": torch.ones(1, 2), "scale": torch.ones(1)}, Path("a.pth"))
        Traceback (most recent call last):
        sftk.errors.CheckpointError: a.pth does not fit the model:
          missing: bias [1]
          unexpected: scale [1]
    """
    own = module.state_dict()
    lines = [f"missing: {name} {list(own[name].shape)}" for name in own.keys() - found.keys()]
    lines += [f"unexpected: {name} {list(found[name].shape)}" for name in found.keys() - own.keys()]
    for name in own.keys() & found.keys():
        if own[name].shape != found[name].shape:
            lines.append(f"shape of {name}: {list(found[name].shape)} in the file, {list(own[name].shape)} in the model")
    if lines:
        shown = sorted(lines)[:_LISTED] + ([f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else [])
        raise CheckpointError(f"{where} does not fit the model:\n  " + "\n  ".join(shown))
    module.load_state_dict(dict(found), assign=True)
