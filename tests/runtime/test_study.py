"""Studies: runs side by side, failures that stop nothing else, signals that reach every run, runs that are not made twice.

Most tests put a light script in the place of `sftk run`; those at the end start real runs.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from sftk.errors import SftkError
from sftk.runtime import jobs
from sftk.runtime.checkpoint import list_checkpoints
from sftk.runtime.rundir import RunDir
from sftk.runtime.study import StudyInterrupted, run_study

SCRIPT = """\
import json, os, signal, sys, time
from pathlib import Path

texts = sys.argv[1:]
folder = Path(texts[texts.index("--run-dir") + 1])
name = f"{folder.parent.name} {folder.name}"
say = TOLD.get(name, "")
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(130))
signal.signal(signal.SIGTERM, lambda *_: stopped.append(143))
with open(LOG, "a") as log:
    print("begin", name, os.environ["OMP_NUM_THREADS"], file=log, flush=True)
    deadline = time.monotonic() + {"wait": 30, "meet": 120}.get(say, 0.3)
    while time.monotonic() < deadline and not stopped:
        time.sleep(0.01)
        if say == "meet" and Path(LOG).read_text().count("begin") > 1:
            break
    print("end", name, file=log, flush=True)
if stopped:
    sys.exit(stopped[0])
if say == "fail":
    print("first line\\nerror: the loss is not finite")
    sys.exit(1)
if say == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
stage = folder / "checkpoints" / "tiny" / "step_00000004"
stage.mkdir(parents=True)
for file in ("checkpoint.json", "generator.safetensors", "generator.ema.safetensors", "fake_score.safetensors"):
    (stage / file).write_text("")
(folder / "texts.json").write_text(json.dumps(texts))
summary = {"seconds": {"train tiny": 2.0}, "student_after": {"frechet": float(folder.name[5:])}}
(folder / "summary.json").write_text(json.dumps(summary))
"""
MATRIX = """\
version: 1
seeds: [0, 1]
matrix:
  - {name: one, recipe: tiny.yaml}
  - {name: two, title: The second, recipe: tiny.yaml, with: {train.steps: 2, models.generator.weights: one/generator}}
"""


@pytest.fixture
def study(tiny, tmp_path, monkeypatch):
    """`study(told, jobs=1, text=MATRIX, **options)`: runs it in tmp_path/study; `told` says what the run `row seed_n` does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    tiny()

    def run(told=None, *overrides, jobs_=2, text=MATRIX, output=None):
        (tmp_path / "both.yaml").write_text(text)
        if told is not None:
            script = tmp_path / "script.py"
            script.write_text(SCRIPT.replace("TOLD", repr(told)).replace("LOG", repr(str(tmp_path / "events.txt"))))
            monkeypatch.setattr(jobs, "_COMMAND", (sys.executable, str(script)))
        console = Console(file=output or io.StringIO(), width=200)
        return run_study("both.yaml", overrides, run_dir=tmp_path / "study", jobs=jobs_, console=console)

    return run


def events(folder):
    return [line.split() for line in (folder / "events.txt").read_text().splitlines()]


def most_at_a_time(found):
    running, most = 0, 0
    for kind, *_ in found:
        running += 1 if kind == "begin" else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("count", [1, 2, 3])
def test_side_by_side_with_their_share_of_threads(study, tmp_path, count):
    run = study({"one seed_0": "meet"} if count > 1 else {}, jobs_=count)
    found = events(tmp_path)
    assert min(count, 2) <= most_at_a_time(found) <= count
    assert {row[3] for row in found if row[0] == "begin"} == {str(max(1, 4 // count))}
    summary = run.read("summary.json")
    assert summary["rows"]["one"]["mean"] == {"frechet": 0.5, "train_seconds": 2.0}
    assert summary["rows"]["two"]["spread"]["frechet"] == pytest.approx(0.5**0.5)
    assert (run.root / "report.html").exists()


def test_weights_are_those_of_the_same_seed_and_awaited(study, tmp_path):
    run = study({}, jobs_=4)
    found = events(tmp_path)
    for seed in "01":
        end, begin = found.index(["end", "one", f"seed_{seed}"]), found.index(["begin", "two", f"seed_{seed}", "1"])
        assert end < begin
        texts = json.loads((run.root / "runs" / "two" / f"seed_{seed}" / "texts.json").read_text())
        weights = run.root / "runs" / "one" / f"seed_{seed}" / "checkpoints/tiny/step_00000004/generator.ema.safetensors"
        assert f'models.generator.weights="{weights}"' in texts
        assert texts.index(f"seed={seed}") < len(texts) - 3
        assert texts[-1] == "--resume"


def test_what_others_wait_for_begins_first(study, tmp_path):
    row = "  - {name: last, recipe: tiny.yaml, with: {train.steps: 3, models.generator.weights: two/generator}}\n"
    study(
        {},
        jobs_=1,
        text=MATRIX.replace("  - {name: one", "  - {name: free, recipe: tiny.yaml, with: {train.steps: 3}}\n  - {name: one")
        + row,
    )
    begun = [" ".join(row[1:3]) for row in events(tmp_path) if row[0] == "begin"]
    assert begun == [f"{name} seed_{seed}" for name in ("one", "two", "free", "last") for seed in "01"]


def test_a_failed_run_is_reported_and_the_others_go_on(study, tmp_path):
    output = io.StringIO()
    with pytest.raises(SftkError, match="1 of 4 runs failed: one seed 0 and 1 that need them were not made"):
        study({"one seed_0": "fail"}, output=output)
    assert "one seed 0: failed (exit code 1)" in output.getvalue()
    assert "ends:\n  | error: the loss is not finite\n" in output.getvalue()
    run = RunDir(tmp_path / "study")
    rows = run.read("summary.json")["rows"]
    states = {(name, seed): found["state"] for name, row in rows.items() for seed, found in row["runs"].items()}
    assert states == {("one", "0"): "failed", ("one", "1"): "done", ("two", "0"): "skipped", ("two", "1"): "done"}
    assert rows["two"]["mean"]["frechet"] == 1.0
    assert rows["two"]["spread"]["frechet"] is None
    report = (run.root / "report.html").read_text()
    assert "error: the loss is not finite" in report
    assert "1 of 2" in report


def test_a_run_that_something_killed_is_a_failed_one(study):
    output = io.StringIO()
    with pytest.raises(SftkError, match="1 of 4 runs failed: two seed 1;"):
        study({"two seed_1": "killed"}, output=output)
    assert "two seed 1: failed (killed by SIGKILL)" in output.getvalue()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_signals_reach_every_run_and_nothing_new_begins(study, tmp_path, number, name):
    def send():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if (tmp_path / "events.txt").exists() and len(events(tmp_path)) == 2:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(StudyInterrupted, match=f"stopped by {name} with 0 of 4 done, 2 stopped") as caught:
        study({"one seed_0": "wait", "one seed_1": "wait"})
    thread.join()
    assert caught.value.signal == name
    assert sorted(row[0] for row in events(tmp_path)) == ["begin", "begin", "end", "end"]
    assert not (tmp_path / "study" / "summary.json").exists()


def test_a_folder_with_something_else_in_it(study, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "recipe.yaml").write_text("version: 1\n")
    with pytest.raises(SftkError, match="holds a run of a recipe"):
        study({})


EVAL = """\
eval:
  use: digits
  with: {student: generator, clips: 2, late_frames: 12, drift_every: 3, sample_prompts: 1, student_sampling: {steps: [1000]}}
checkpoint"""


def times(run):
    return {
        path.parent.parent.name + path.parent.name: path.stat().st_mtime_ns for path in run.root.glob("runs/*/*/summary.json")
    }


def test_real_runs_with_and_without_a_mistake(study, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    bad = MATRIX.replace("models.generator.weights: one/generator", "models.fake_score.size: digits")
    with pytest.raises(SftkError, match="2 of 4 runs failed: two seed 0, two seed 1;"):
        study(None, "train.steps=1", text=bad)
    run = RunDir(tmp_path / "study")
    one, two = run.read("summary.json")["rows"].values()
    assert [found["state"] for found in (*one["runs"].values(), *two["runs"].values())] == ["done"] * 2 + ["failed"] * 2
    assert one["mean"].keys() == {"train_seconds"}
    assert any("do not fit the model" in line for line in two["runs"]["0"]["log"])
    for seed, found in one["runs"].items():
        (row,) = (run.root / found["folder"] / "metrics.jsonl").read_text().splitlines()
        assert json.loads(row)["step"] == 1
        assert f"seed={seed}" in (run.root / found["folder"] / "log.txt").read_text()


@pytest.mark.slow
def test_real_runs_and_what_is_made_again(study, tiny, tmp_path, monkeypatch):
    """Two recipes with two seeds; then nothing, then a new judgement alone, then an error where another recipe ran."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    tiny("checkpoint", EVAL)
    run = study()
    rows = run.read("summary.json")["rows"]
    assert {found["state"] for row in rows.values() for found in row["runs"].values()} == {"done"}
    assert rows["one"]["runs"]["0"]["frechet"] != rows["one"]["runs"]["1"]["frechet"]
    assert rows["two"]["title"] == "The second"
    assert rows["two"]["drift"]["start"] == [0, 3, 6]
    assert (run.root / "samples" / "a_3_moving_left.png").exists()
    report = (run.root / "report.html").read_text()
    assert re.search(r"\d <small>± \d", report)
    assert report.count('class="curve c1"') == 3
    done = times(run)
    assert len(done) == 4
    output = io.StringIO()
    assert times(study(output=output)) == done
    assert "4 runs, 4 of them done before" in output.getvalue()
    steps = [path.stat().st_mtime_ns for path in sorted(run.root.glob("runs/*/*/checkpoints/tiny/*/checkpoint.json"))]
    again = study(None, "seeds=[0]", "one.eval.with.clips=3", text=MATRIX)
    now = times(again)
    assert {name for name in now if now[name] != done[name]} == {"oneseed_0"}
    assert [path.stat().st_mtime_ns for path in sorted(run.root.glob("runs/*/*/checkpoints/tiny/*/checkpoint.json"))] == steps
    assert list(again.read("summary.json")["rows"]["one"]["runs"]) == ["0"]
    with pytest.raises(
        SftkError, match=r"seed_0 holds a run of another recipe: \$.optimizers.generator.lr was 0.001 and is 0.5"
    ):
        study(None, "two.optimizers.generator.lr=0.5")


@pytest.mark.slow
def test_real_runs_interrupted_and_gone_on_with(study, tiny, command, tmp_path):
    tiny("frames: 6", "frames: 12")
    (tmp_path / "both.yaml").write_text(MATRIX.replace("train.steps: 2, ", ""))
    options = ("run", "both.yaml", "train.steps=40", "checkpoint.every=100", "--jobs", "2", "--run-dir")
    process = command(*options, "stopped", cwd=tmp_path)
    metrics = [tmp_path / "stopped" / "runs" / "one" / f"seed_{seed}" / "metrics.jsonl" for seed in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_bytes().count(b"\n") >= 2 for path in metrics):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130, (printed, error)
    assert "stopped by SIGINT with 0 of 4 done, 2 stopped; go on with --resume" in error
    assert "Traceback" not in error + "".join(path.with_name("log.txt").read_text() for path in metrics)
    for path in metrics:
        (saved,) = list_checkpoints(path.parent / "checkpoints" / "tiny")
        assert path.read_bytes().count(b"\n") == int(saved.name[-8:]) < 40
    for folder in ("stopped", "whole"):
        process = command(*options, folder, cwd=tmp_path)
        output = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for path in (tmp_path / "whole" / "runs").glob("*/*/metrics.jsonl"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.relative_to(tmp_path / "whole")).read_bytes()
