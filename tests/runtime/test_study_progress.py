"""What a terminal shows of a study: a table that says how far each run is, or lines without escape codes."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from sftk.runtime import study_progress
from sftk.runtime.study_progress import StudyProgress, counts


def run(name, seed, state, step=None, seconds=0.0):
    return SimpleNamespace(name=f"{name} seed {seed}", state=state, seconds=seconds, steps=40, step=lambda: step)


@pytest.fixture
def runs():
    found = [
        ("tf", 0, "done", None, 75.0), ("tf", 1, "running", 12, 0.0), ("tf", 2, "failed", None, 0.0),
        ("dmd", 0, "running", None, 0.0), ("dmd", 1, "running", 40, 0.0), ("cd", 2, "done", None, 0.0),
    ]  # fmt: skip
    return {(name, seed): run(name, seed, *rest) for name, seed, *rest in found}


def test_counts(runs):
    assert counts(runs.values()) == "2 of 6 done, 3 running, 1 failed"


def test_table_on_a_terminal(runs):
    output = io.StringIO()
    with StudyProgress(Console(file=output, force_terminal=True, width=100, color_system=None), runs) as progress:
        progress.event("tf seed 1: started")
        progress.note("tf seed 2: failed")
    text = output.getvalue()
    assert "started" not in text
    assert "tf seed 2: failed" in text
    lines = [line.split("  ") for line in text.splitlines() if line.startswith(("tf  ", "dmd  ", "cd  "))]
    last = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert last == {
        "tf": ["done in 1 min 15 s", "12/40", "failed"], "dmd": ["starting", "evaluating"], "cd": ["done before"],
    }  # fmt: skip
    assert "2 of 6 done, 3 running, 1 failed" in text


def test_plain_lines_elsewhere(runs, monkeypatch):
    clock = iter([0.0, 30.0, 61.0, 61.0, 90.0])
    monkeypatch.setattr(study_progress.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    with StudyProgress(Console(file=output, width=60), runs) as progress:
        progress.event("tf seed 1: started")
        progress.tick()
        progress.tick()
        progress.tick()
    assert output.getvalue().splitlines() == [
        "tf seed 1: started",
        "2 of 6 done, 3 running, 1 failed, 1 min 1 s gone: tf seed 1 12/40, dmd seed 0 starting, dmd seed 1 evaluating",
    ]
    assert "\x1b" not in json.dumps(output.getvalue())
