"""Weights in and out of safetensors files, strict, with a readable list of what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sftk.errors import CheckpointError
from sftk.models.config import WanConfig
from sftk.models.wan import WanModel

Module = TypeVar("Module", bound=nn.Module)

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def save_weights(
    model: nn.Module, path: Path, *, dtype: torch.dtype | None = None, about: dict[str, Any] | None = None
) -> None:
    """Writes a model's weights under their own names, with its config in the file's metadata.

    Args:
        dtype: cast to it; None keeps the weights' own.
        about: further metadata.
    """
    tensors = {name: _portable(tensor, dtype) for name, tensor in model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in (about or {}).items()}
    config = getattr(model, "config", None)
    if config is not None:
        metadata["config"] = json.dumps(attrs.asdict(config))
    save_file(tensors, path, metadata=metadata)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file into a model, in place; names and shapes must fit exactly.

    A part that the model adds to what was trained (its `added_parts`) may be missing as a whole; it stays as it is.

    Raises:
        CheckpointError: the file is missing, broken or of another model; the message lists what does not fit.
    """
    found = read_tensors(path)
    with torch.no_grad():
        own = model.state_dict()
        for part in getattr(model, "added_parts", ()):
            if not any(name.startswith(f"{part}.") for name in found):
                own = {name: tensor for name, tensor in own.items() if not name.startswith(f"{part}.")}
        differences = _differences(own, found)
        if differences:
            shown = "\n  ".join(differences[:12]) + (f"\n  and {len(differences) - 12} more" if len(differences) > 12 else "")
            raise CheckpointError(f"the weights in {path} do not fit the model:\n  {shown}")
        for name, tensor in own.items():
            tensor.copy_(found[name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or broken.
    """
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}; expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def read_config(path: Path) -> WanConfig:
    """The config in a file that `save_weights` wrote.

    Raises:
        CheckpointError: it is missing, broken or holds no config.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    if "config" not in metadata:
        raise CheckpointError(f"{path} holds no model config in its metadata; it was not written by sftk")
    values = json.loads(metadata["config"])
    return WanConfig(**(values | {"patch_size": tuple(values["patch_size"])}))


def build_model(
    config: WanConfig, *, weights: Path | None, seed: int, dtype: str, backend: Any, device: torch.device
) -> WanModel:
    """A backbone with given or random weights.

    Args:
        weights: a safetensors file, or None for random weights drawn from `seed`.
        dtype: `fp32`, `bf16` or `fp64`, of the parameters.

    Raises:
        CheckpointError: the weights do not fit.

    Example:
        >>> from sftk.models.config import preset
        >>> cpu = torch.device("cpu")
        >>> build_model(preset("digits"), weights=None, seed=0, dtype="bf16", backend="auto", device=cpu).head.head.weight.dtype
        torch.bfloat16
    """
    return build_module(lambda: WanModel(config, backend), weights=weights, seed=seed, dtype=dtype, device=device)


def build_module(make: Callable[[], Module], *, weights: Path | None, seed: int, dtype: str, device: torch.device) -> Module:
    """A module with given or random weights, see `build_model`; with given ones only added parts are drawn at random.

    Args:
        make: constructs it.

    Example:
        >>> build_module(lambda: nn.Linear(2, 1), weights=None, seed=0, dtype="fp64", device=torch.device("cpu")).weight.dtype
        torch.float64
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        if weights is None:
            return make().to(DTYPES[dtype])
        with torch.device("meta"):
            model = make()
        model = model.to(DTYPES[dtype]).to_empty(device=device)
        if isinstance(model, WanModel):
            model.reset_added_parts()
    load_weights(model, weights)
    return model


def _portable(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.cpu().contiguous()


def _differences(own: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    lines = [f"missing: {name} {list(own[name].shape)}" for name in own if name not in found]
    lines += [f"unexpected: {name} {list(found[name].shape)}" for name in found if name not in own]
    lines += [
        f"shape of {name}: the file has {list(found[name].shape)}, the model {list(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    return lines
