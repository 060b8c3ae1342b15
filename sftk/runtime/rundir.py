"""The folder of a run: what lies where, and how a new one is named."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import attrs

from sftk.errors import SftkError


@attrs.frozen
class RunDir:
    """Paths in a run's folder.

    Args:
        root: the folder itself.
        writes: whether this process writes: the first rank of a run.
    """

    root: Path
    writes: bool = True

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The run's figures."""
        return self.root / "summary.json"

    @property
    def samples(self) -> Path:
        """Videos and contact sheets."""
        return self.root / "samples"

    def checkpoints(self, stage: str) -> Path:
        """A stage's checkpoints."""
        return self.root / "checkpoints" / stage

    def tensorboard(self, stage: str) -> Path:
        """A stage's TensorBoard events."""
        return self.root / "tensorboard" / stage

    def log(self, rank: int) -> Path:
        """What a rank other than the first prints."""
        return self.root / "logs" / f"rank_{rank}.log"

    def read(self, name: str) -> Any:
        """A JSON file of the run, or None."""
        path = self.root / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file; it is complete or not there."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file; it is complete or not there."""
        if self.writes:
            write_text(self.root / name, text)


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say which file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_run(name: str, run_dir: Path | None, resume: bool) -> RunDir:
    """The folder of a run: a new one, or the one to go on in.

    Args:
        name: of the recipe.
        run_dir: the folder itself; None makes `runs/<name>/<time>`, or with `resume` takes the newest one there.
        resume: go on from the last checkpoint, if there is one.

    Raises:
        SftkError: the folder holds a run and `resume` is off.
    """
    base = Path("runs") / name
    if run_dir is None:
        newest = max((p for p in base.glob("*") if (p / "recipe.yaml").is_file()), default=None) if resume else None
        run_dir = newest or _fresh(base)
    root = RunDir(run_dir)
    if root.recipe.exists() and not resume:
        raise SftkError(f"{run_dir} holds a run already; add --resume to go on with it, or take another --run-dir")
    if run_dir.exists() and not run_dir.is_dir():
        raise SftkError(f"{run_dir} is a file; expected a folder for the run")
    run_dir.mkdir(parents=True, exist_ok=True)
    return root


def _fresh(base: Path) -> Path:
    """A new folder, which no other process that starts in the same second takes."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in count():
        path = base / (f"{stamp}-{number}" if number else stamp)
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("there is always another number")


def redirect_output(log: Path) -> None:
    """Sends everything that this process prints, libraries included, to a file's end from now on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
