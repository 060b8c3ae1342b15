"""Checkpoints: a folder is complete or invisible, the older one stays whole until the newer one is."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sftk.errors import CheckpointError
from sftk.models.weights import load_weights, save_weights

_NAME = re.compile(r"step_(\d{8})")


def save_checkpoint(folder: Path, step: int, models: dict[str, nn.Module], training: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step_<step>/` with one safetensors file for each model and `training.pt`, then drops old ones.

    Args:
        folder: of the stage's checkpoints.
        step: steps done.
        models: name to module.
        training: tensors, numbers and containers (read back with `weights_only=True`).
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".writing-*"):
        shutil.rmtree(torn)
    target, temporary = folder / f"step_{step:08d}", folder / f".writing-{step:08d}"
    temporary.mkdir()
    for name, module in models.items():
        save_weights(module, temporary / f"{name}.safetensors", about={"step": step, "role": name})
    torch.save(training, temporary / "training.pt")
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return (list_checkpoints(folder) or [None])[-1]


def checkpoint_step(path: Path) -> int:
    """Steps done at a checkpoint.

    Example:
        >>> checkpoint_step(Path("checkpoints/dmd/step_00000120"))
        120
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder; expected a name such as step_00000120")
    return int(match.group(1))


def load_checkpoint(path: Path, models: dict[str, nn.Module]) -> dict[str, Any]:
    """Loads a checkpoint's weights into the models, in place, and returns its training state.

    Raises:
        CheckpointError: a file is missing, broken or of another model.
    """
    for name, module in models.items():
        load_weights(module, path / f"{name}.safetensors")
    try:
        return torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path / 'training.pt'} cannot be read: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
