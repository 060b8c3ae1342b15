"""Weights of the text encoder and of the VAE: mapped from the disk, and made a module's parameters without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sftk.errors import CheckpointError
from sftk.models.tensor_files import Stored, read_pickle, read_safetensors, stream
from sftk.models.weight_folders import read_folder, shown_contents

_LISTED = 12


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth` file that holds a state dict.

    Raises:
        CheckpointError: it is missing or broken, or holds more than tensors.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"weight": torch.ones(2)}, file)
        >>> map_file(file)
        {'weight': tensor([1., 1.])}
    """
    return _mapped(read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path, None))


def map_folder(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder: one file, or shards, with their index.

    Args:
        stem: how the weight files' names begin, `model` (transformers) or `diffusion_pytorch_model` (diffusers).

    Raises:
        CheckpointError: there is no such file, a shard is missing or broken, or the index and the shards disagree.
    """
    if not any((*folder.glob(f"{stem}*.safetensors"), *folder.glob(f"{stem}*.index.json"))):
        raise CheckpointError(f"{folder} holds no {stem}*.safetensors, only {shown_contents(folder)}; download it again")
    return _mapped(read_folder(folder, stem))


def assign_weights(module: nn.Module, found: Mapping[str, Tensor], where: Path) -> None:
    """Makes tensors the parameters of a module that was built on the meta device; nothing is copied.

    Raises:
        CheckpointError: names or shapes differ; the message lists them.

    Example:
        >>> import torch
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


def _mapped(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    names = {(item.file, item.name): name for name, item in stored.items()}
    return {names[item.file, item.name]: tensor for item, tensor in stream(stored.values())}
