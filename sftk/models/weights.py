"""Weights into models, strict, with a readable list of what does not fit; and out into our own files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sftk.errors import CheckpointError
from sftk.models.config import WanConfig
from sftk.models.config_files import told_by_json, told_by_shapes
from sftk.models.formats import WeightSource, open_weights
from sftk.models.tensor_files import Stored, read_safetensors, stream
from sftk.models.wan import WanModel

Module = TypeVar("Module", bound=nn.Module)

Here = Callable[[Tensor], tuple[Tensor, slice | None]]
"""A parameter to the tensor that this process holds of it and the rows that it is of the whole; None is all of them."""

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
    save_file(tensors, path, metadata=weights_metadata(model, about or {}))


def weights_metadata(model: object, about: Mapping[str, Any]) -> dict[str, str]:
    """What a file of ours says about its weights: the model's config, and `about`."""
    metadata = {key: json.dumps(value) for key, value in about.items()}
    config = getattr(model, "config", None)
    if config is not None:
        metadata["config"] = json.dumps(attrs.asdict(config))
    return metadata


def load_weights(model: nn.Module, path: Path, here: Here = lambda tensor: (tensor, None)) -> None:
    """Loads weights into a model, in place, one tensor at a time; names and shapes must fit exactly.

    A part that the model adds to what was trained (its `added_parts`) may be missing as a whole; it stays as it is.

    Args:
        path: a backbone takes whatever `open_weights` reads, another module a safetensors file.
        here: what of a parameter this process holds; nothing else is read.

    Raises:
        CheckpointError: the file is missing, broken or of another model; the message lists what does not fit.
    """
    source, own = check_weights(model, path)
    held = {name: here(tensor) for name, tensor in own.items()}
    with torch.no_grad():
        for name, tensor in source.tensors({name: rows for name, (_, rows) in held.items()}):
            held[name][0].copy_(tensor)


def check_weights(model: nn.Module, path: Path) -> tuple[WeightSource, dict[str, Tensor]]:
    """That a model takes the weights at a path, by their names and shapes; no value is read.

    Args:
        model: may be on the meta device.
        path: see `load_weights`.

    Returns:
        The weights, and the model's own tensors that they are for.

    Raises:
        CheckpointError: see `load_weights`.
    """
    source = open_weights(path)
    own = model.state_dict()
    for part in getattr(model, "added_parts", ()):
        if not any(name.startswith(f"{part}.") for name in source.stored):
            own = {name: tensor for name, tensor in own.items() if not name.startswith(f"{part}.")}
    if isinstance(model, WanModel):
        source.check_backbone()
    check_fit(own, source.stored, path, _other_size(model, source))
    if isinstance(model, WanModel) and source.settings is not None:
        _check_config(model.config, source)
    return source, own


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or broken.
    """
    return {stored.name: tensor for stored, tensor in stream(read_safetensors(path)[0].values())}


def read_config(path: Path) -> WanConfig:
    """The size of the backbone whose weights lie at `path`, see `open_weights`.

    Raises:
        CheckpointError: nothing lies there, it is broken, or no backbone's.
    """
    return open_weights(path).config()


def build_model(
    config: WanConfig, *, weights: Path | None, seed: int, dtype: str, backend: Any, device: torch.device
) -> WanModel:
    """A backbone with given or random weights.

    Args:
        weights: what `open_weights` reads, or None for random weights drawn from `seed`.
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


def build_module(
    make: Callable[[], Module],
    *,
    weights: Path | None,
    seed: int,
    dtype: str,
    device: torch.device,
    wrap: Callable[[Module], Module] = lambda module: module,
    here: Here = lambda tensor: (tensor, None),
) -> Module:
    """A module with given or random weights, see `build_model`; with given ones only added parts are drawn at random.

    Args:
        make: constructs it.
        wrap: what is done to it before it takes memory, where weights are given: sharding, say.
        here: what of a parameter this process then holds; only that is read.

    Example:
        >>> build_module(lambda: nn.Linear(2, 1), weights=None, seed=0, dtype="fp64", device=torch.device("cpu")).weight.dtype
        torch.float64
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        if weights is None:
            return wrap(make().to(DTYPES[dtype]))
        with torch.device("meta"):
            model = make().to(DTYPES[dtype])
        added = _draw_added(model, device)
        model = wrap(model).to_empty(device=device)
    for name, tensor in model.state_dict().items():
        if name in added:
            held, rows = here(tensor)
            held.copy_(added[name] if rows is None else added[name][rows])
    load_weights(model, weights, here)
    return model


def _draw_added(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Values of a backbone's added parts, which a file need not have."""
    found: dict[str, Tensor] = {}
    for part in getattr(model, "added_parts", ()):
        drawn = copy.deepcopy(model.get_submodule(part)).to_empty(device=device)
        drawn.reset_parameters()  # pyright: ignore[reportCallIssue]
        found |= {f"{part}.{name}": tensor for name, tensor in drawn.state_dict().items()}
    return found


def _portable(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.cpu().contiguous()


def check_fit(own: Mapping[str, Tensor], stored: Mapping[str, Stored], path: Path, hint: str = "") -> None:
    """That stored weights have a model's names and shapes.

    Args:
        own: of the model.
        stored: by the model's names.
        path: that they lie at.
        hint: what to do about it.

    Raises:
        CheckpointError: they do not; the message lists what does not fit.
    """
    shown = {name: name if item.name == name else f"{name} (there {item.name})" for name, item in stored.items()}
    lines = [f"missing: {name} {list(own[name].shape)}" for name in own if name not in stored]
    lines += [f"unexpected: {shown[name]} {list(stored[name].shape)}" for name in stored if name not in own]
    sharded = len({item.file for item in stored.values()}) > 1
    lines += [
        f"shape of {shown[name]}: {stored[name].file.name if sharded else 'the file'} has {list(stored[name].shape)}, "
        f"the model {list(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != tuple(own[name].shape)
    ]
    if lines:
        listed = "\n  ".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
        raise CheckpointError(f"the weights in {path} do not fit the model:\n  {listed}" + (f"\n  {hint}" if hint else ""))


def _other_size(model: nn.Module, source: WeightSource) -> str:
    """What to do about weights of a backbone of another size; nothing where they do not tell one, or tell this one."""
    if not isinstance(model, WanModel):
        return ""
    try:
        told = told_by_shapes(source.shapes, source.path)
    except CheckpointError:
        return ""
    other = {key: value for key, value in told.items() if value != getattr(model.config, key)}
    if not other:
        return ""
    found, expected = (
        ", ".join(f"{k} {v}" for k, v in sizes.items()) for sizes in (other, {k: getattr(model.config, k) for k in other})
    )
    return f"they are of another size, {found}, and the model has {expected}: name others, or write size: auto"


def _check_config(config: WanConfig, source: WeightSource) -> None:
    """What config.json says and shapes do not show, such as the number of heads."""
    told = told_by_json(source.settings or {}, source.settings_path)
    for key in ("num_heads", "eps"):
        if key in told and told[key] != getattr(config, key):
            raise CheckpointError(
                f"{source.settings_path} says {key}: {told[key]}, the model has {getattr(config, key)}; write size: auto to "
                "take it from there"
            )
