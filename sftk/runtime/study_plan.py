"""The runs of a study: where each lies, what is left to do of it, and the command that does it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from sftk.errors import SftkError
from sftk.runtime.rundir import RunDir
from sftk.runtime.stage import saved_weights
from sftk.spec.fingerprint import first_difference
from sftk.spec.source import read_yaml
from sftk.spec.study import Row, Study

State = Literal["waiting", "running", "done", "failed", "stopped", "skipped"]
Runs = Mapping[tuple[str, int], "PlannedRun"]
"""(row, seed) to its run."""


@attrs.define(kw_only=True, eq=False)
class PlannedRun:
    """One row with one seed.

    Args:
        row, seed: what it runs.
        folder: where it runs.
        needs: role to the (row, seed, role) whose weights it takes.
        state: how far it is.
        seconds: how long this command has spent on it.
        message: what went wrong.
        log_tail: the end of its log, when it failed.
    """

    row: Row
    seed: int
    folder: RunDir
    needs: dict[str, tuple[str, int, str]]
    state: State = "waiting"
    seconds: float = 0.0
    message: str = ""
    log_tail: list[str] = attrs.field(factory=list)

    @property
    def name(self) -> str:
        """In messages: `dmd seed 0`."""
        return f"{self.row.name} seed {self.seed}"

    @property
    def log(self) -> Path:
        """Everything that its process printed."""
        return self.folder.root / "log.txt"

    @property
    def steps(self) -> int:
        """How many it trains."""
        return self.row.stage.recipe.train.steps

    def step(self) -> int | None:
        """The last step that it wrote down; None before the first."""
        try:
            with self.folder.metrics.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 2**14))
                lines = file.read().split(b"\n")[:-1]
            return int(json.loads(lines[-1])["step"])
        except (OSError, ValueError, IndexError, KeyError):
            return None

    def arguments(self, runs: Runs) -> list[str]:
        """Of `sftk`, once what it needs is done."""
        texts = [*self.row.overrides, f"seed={self.seed}"]
        for role, (row, seed, source) in self.needs.items():
            texts.append(f"models.{role}.weights={json.dumps(str(runs[row, seed].weights(source)))}")
        return ["run", str(self.row.stage.path), *texts, "--run-dir", str(self.folder.root), "--resume"]

    def weights(self, role: str) -> Path:
        """The file that the run left for a role."""
        stage = attrs.evolve(self.row.stage, name=self.row.stage.path.stem)
        return saved_weights(stage, self.folder.checkpoints(stage.name))[f"{stage.name}/{role}"].resolve()

    def look(self) -> None:
        """Finds out what an earlier command did of it.

        A run whose evaluation alone changed is judged again, and not trained.

        Raises:
            SftkError: the folder holds a run of another recipe.
        """
        if not self.folder.recipe.exists():
            return
        was, now = (self._without_handoffs(value) for value in (read_yaml(self.folder.recipe).value, self.row.stage.resolved))
        now["seed"] = self.seed
        judged = was.pop("eval", None) == now.pop("eval", None)
        if (found := first_difference(was, now)) is not None:
            raise SftkError(
                f"{self.folder.root} holds a run of another recipe: {found}; remove that folder, or take another --run-dir"
            )
        if not judged:
            for name in ("summary.json", "student_before.json"):
                (self.folder.root / name).unlink(missing_ok=True)
        self.state = "done" if self.folder.summary.exists() else "waiting"

    def _without_handoffs(self, value: dict[str, Any]) -> dict[str, Any]:
        value = copy.deepcopy(value)
        for role in self.needs:
            value.get("models", {}).get(role, {}).pop("weights", None)
        return value


def plan_runs(study: Study, folder: Path) -> dict[tuple[str, int], PlannedRun]:
    """Every run of a study, rows in order and seeds in order.

    Args:
        study: what to run.
        folder: of the study.

    Raises:
        SftkError: a run's folder holds a run of another recipe.

    Example:
        >>> from sftk.spec.study import load_study
        >>> runs = plan_runs(load_study("recipes/digits/study.yaml", ["seeds=[7]"]), Path("somewhere"))
        >>> sorted(seed for row, seed in runs if row in ("tf", "tf_1")), {run.state for run in runs.values()}
        ([0, 7], {'waiting'})
    """
    seeds = {row.name: row.seeds for row in study.rows}
    runs = {}
    for row in study.rows:
        for seed in row.seeds:
            needs = {
                role: (source, seed if seed in seeds[source] else seeds[source][0], name)
                for role, (source, name) in row.handoffs.items()
            }
            root = folder / "runs" / row.name / f"seed_{seed}"
            runs[row.name, seed] = PlannedRun(row=row, seed=seed, folder=RunDir(root), needs=needs)
    for run in runs.values():
        run.look()
    return runs


def chain_lengths(runs: Runs) -> dict[tuple[str, int], int]:
    """Of each run, how many runs must follow it one after the other: whoever begins long chains first ends first.

    Example:
        >>> from sftk.spec.study import load_study
        >>> lengths = chain_lengths(plan_runs(load_study("recipes/digits/study.yaml"), Path("somewhere")))
        >>> lengths["tf_1", 0], lengths["init_1", 0], lengths["tf", 0]
        (2, 1, 0)
    """
    lengths = dict.fromkeys(runs, 0)
    for key, run in reversed(list(runs.items())):  # a run needs earlier ones only
        for row, seed, _ in run.needs.values():
            lengths[row, seed] = max(lengths[row, seed], lengths[key] + 1)
    return lengths
