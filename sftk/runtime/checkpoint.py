"""The folders of checkpoints: a folder is complete or invisible, the older one stays whole until the newer one is."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sftk.errors import CheckpointError
from sftk.models.shard_files import shard_stem
from sftk.runtime.checkpoint_storage import sync, writing

_NAME = re.compile(r"step_(\d{8})")
_FACTS = "checkpoint.json"

OPTIMIZER, AVERAGE = ".optimizer", ".ema"
"""What follows a role's name in the names of files."""


def unfinished(folder: Path, step: int) -> Path:
    """Where a checkpoint lies while it is written.

    Example:
        >>> unfinished(Path("checkpoints/dmd"), 120).name
        '.writing-00000120'
    """
    return folder / f".writing-{step:08d}"


def begin(folder: Path, step: int) -> None:
    """Clears away what a killed run left half written or half removed, and makes the folder to write into.

    Args:
        folder: of the stage's checkpoints; made where it is not there.
        step: steps done.

    Example: see `publish`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for torn in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        shutil.rmtree(torn)
    with writing(unfinished(folder, step)):
        unfinished(folder, step).mkdir()


def publish(folder: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Shows the checkpoint of a step, whose files are all written, and drops old ones.

    Args:
        folder: of the stage's checkpoints.
        step: steps done.
        facts: what `read_facts` gives back.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for step in (1, 2, 3):
        ...     begin(folder, step)
        ...     path = publish(folder, step, {"step": step}, keep=2)
        >>> [path.name for path in list_checkpoints(folder)], read_facts(path)
        (['step_00000002', 'step_00000003'], {'step': 3})
    """
    temporary, target = unfinished(folder, step), folder / f"step_{step:08d}"
    with writing(temporary / _FACTS):
        (temporary / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for path in (temporary / _FACTS, temporary):
            sync(path)
    if target.exists():
        _remove(target)
    os.replace(temporary, target)
    sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Makes it invisible first, so that a kill leaves no half of it to be found."""
    hidden = checkpoint.with_name(f".removing-{checkpoint.name}")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return (list_checkpoints(folder) or [None])[-1]


def checkpoint_step(path: Path) -> int:
    """Steps done at a checkpoint.

    Raises:
        CheckpointError: the folder has another name.

    Example:
        >>> checkpoint_step(Path("checkpoints/dmd/step_00000120"))
        120
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder; expected a name such as step_00000120")
    return int(match.group(1))


def checkpoint_files(path: Path) -> dict[str, Path]:
    """What a checkpoint holds: `<role>`, `<role>.ema` and `<role>.optimizer` to a file; of several ranks' files the first."""
    stems = {file: shard_stem(file) for file in sorted(path.glob("*.safetensors"))}
    return {stem: file for file, stem in stems.items() if stem is not None}


def read_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        CheckpointError: its file is missing or broken.
    """
    file = path / _FACTS
    fix = f"remove {path.name}, and the one before it is taken"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; {fix}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{file} holds no mapping, but {type(facts).__name__}; {fix}")
    return facts
