"""The figures of a study: each run's, and their mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

import sftk
from sftk.runtime.rundir import RunDir
from sftk.runtime.study_plan import PlannedRun, Runs
from sftk.spec.study import Study

_JUDGED = ("student_after", "teacher")
_REFERENCES = ("real", "teacher")


def run_figures(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run: those of what it trained, and the seconds that this took.

    Args:
        summary: a run's `summary.json`.

    Example:
        >>> run_figures({"seconds": {"train dmd": 7.5, "evaluate": 2.0}, "student_after": {"frechet": 5.0}})
        {'frechet': 5.0, 'train_seconds': 7.5}
    """
    row = next((summary[name] for name in _JUDGED if name in summary), {})
    trained = [value for name, value in summary.get("seconds", {}).items() if name.startswith("train ")]
    return {**row, "train_seconds": round(sum(trained), 1)} if trained else dict(row)


def aggregate(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and spread of rows of figures, which may hold groups of figures and lists of them.

    Args:
        rows: one for each seed, with the same keys; a value may be None.

    Returns:
        The mean, and the sample standard deviation (None for fewer than two values), in the same form.

    Example:
        >>> aggregate([{"frechet": 4.0, "late": {"frechet": 8.0}}, {"frechet": 6.0, "late": {"frechet": 8.0}}])
        ({'frechet': 5.0, 'late': {'frechet': 8.0}}, {'frechet': 1.4142135623730951, 'late': {'frechet': 0.0}})
    """
    mean: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            mean[key] = spread[key] = None
        elif isinstance(values[0], dict):
            mean[key], spread[key] = aggregate(values)
        elif isinstance(values[0], list):
            parts = [_of_numbers(column) for column in zip(*values, strict=True)]
            mean[key], spread[key] = [part[0] for part in parts], [part[1] for part in parts]
        else:
            mean[key], spread[key] = _of_numbers(values)
    return mean, spread


def _of_numbers(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def write_summary(study: Study, folder: RunDir, runs: Runs, *, jobs: int, seconds: float) -> dict[str, Any]:
    """Writes a study's `summary.json`.

    Args:
        study: what was run.
        folder: of the study.
        runs: its runs, ended.
        jobs: how many ran at a time.
        seconds: how long it took in all; of several commands, this is added to what earlier ones took.

    Returns:
        What was written: facts, `references` (real clips, teacher) and `rows`, each with its `runs` by seed, their `mean` and
        `spread`, and where the evaluator gave it the mean `drift`.
    """
    rows, references, device = {}, {}, None
    for row in study.rows:
        mine = [runs[row.name, seed] for seed in row.seeds]
        done = {run.seed: run.folder.read("summary.json") for run in mine if run.state == "done"}
        mean, spread = aggregate([run_figures(summary) for summary in done.values()])
        drifts = [found for summary in done.values() if (found := _drift(summary)) is not None]
        rows[row.name] = {
            "title": row.title,
            "group": row.section.group,
            "labels": row.section.labels,
            "recipe": row.section.recipe,
            "steps": row.stage.recipe.train.steps,
            "runs": {str(run.seed): _of_run(run, folder, done.get(run.seed)) for run in mine},
            "mean": mean,
            "spread": spread,
            **({"drift": aggregate(drifts)[0]} if drifts else {}),
        }
        for summary in done.values():
            device = device or summary.get("device")
            references = {name: summary[name] for name in _REFERENCES if name in summary} | references
    earlier = (folder.read("summary.json") or {}).get("seconds", 0.0)
    written = {
        "study": study.name,
        "doc": study.doc,
        "device": device,
        "jobs": jobs,
        "seconds": round(earlier + seconds, 1),
        "seeds": sorted({seed for row in study.rows for seed in row.seeds}),
        "sftk": sftk.__version__,
        "torch": torch.__version__,
        "references": references,
        "rows": rows,
    }
    folder.write("summary.json", written)
    return written


def headline(folder: RunDir) -> str:
    """The first figures of a run that ended, for a line of progress.

    Example:
        >>> from pathlib import Path
        >>> headline(RunDir(Path("no/such/run")))
        ''
    """
    figures = run_figures(folder.read("summary.json") or {})
    shown = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items() if isinstance(value, float)]
    return f"; {', '.join(shown[:3])}" if len(shown) > 1 else ""


def _drift(summary: dict[str, Any]) -> dict[str, Any] | None:
    found = summary.get("drift", {})
    return next((found[name] for name in _JUDGED if name in found), None)


def _of_run(run: PlannedRun, folder: RunDir, summary: dict[str, Any] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"state": run.state, "folder": run.folder.root.relative_to(folder.root).as_posix()}
    if run.message:
        facts |= {"message": run.message}
    if run.log_tail:
        facts |= {"log": run.log_tail}
    if summary is None:
        return facts
    drift = _drift(summary)
    return facts | run_figures(summary) | ({"drift": drift} if drift else {})
