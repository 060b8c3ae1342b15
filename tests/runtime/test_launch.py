"""`sftk run --nproc`: processes on this node, from one command to one report."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.errors import DistributedError
from sftk.runtime.launch import Launch, processes

TWO = ("batch.global=4", "batch.per_rank=1")
EVAL = (
    "eval={use: digits, with: {student: generator, clips: 3, late_frames: null, batch: 2, sample_prompts: 1, before: false, "
    "student_sampling: {steps: [1000, 500], shift: 3.0}}}"
)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, float | int)}


def child(pid: int, rank: int) -> int | None:
    """The process of a rank, among the children of the launcher."""
    for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{found}/environ").read_bytes().split(b"\0"):
            return int(found)
    return None


def test_two_processes_write_what_one_does(tiny, train, command, tmp_path):
    recipe = tiny()
    whole = train(recipe, "train.steps=2", *TWO, EVAL, to="whole")
    run = tmp_path / "two"
    process = command("run", recipe, "train.steps=2", *TWO, EVAL, "--run-dir", run, "--nproc", "2", cwd=tmp_path)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, (output, errors)
    assert output.count("finished: ") == 1
    for row, found in zip(rows(whole.root), rows(run), strict=True):
        assert numbers(found) == pytest.approx(numbers(row), rel=1e-4)
    one, two = whole.read("summary.json"), json.loads((run / "summary.json").read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert numbers(two["student_after"])["frechet"] > 0
    assert numbers(two["student_after"]) == pytest.approx(numbers(one["student_after"]), rel=1e-3)
    assert (run / "logs" / "rank_1.log").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_is_killed(tiny, command, tmp_path, restarts):
    run = tmp_path / "run"
    arguments = ("run", tiny(), "train.steps=12", *TWO, "--run-dir", run, "--nproc", "2", "--max-restarts", restarts)
    process = command(*arguments, cwd=tmp_path)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    found = child(process.pid, 1)
    assert found is not None
    os.kill(found, signal.SIGKILL)
    output, errors = process.communicate(timeout=240)
    if restarts:
        assert process.returncode == 0, (output, errors)
        assert [row["step"] for row in rows(run)] == list(range(1, 13))
    else:
        assert process.returncode == 128 + signal.SIGKILL, (output, errors)
        assert "error: rank 1 was ended by SIGKILL" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nproc", "3"), "does not split into passes of"),
        (("--nproc", "two"), "--nproc 'two': expected a number of processes, or auto"),
        (("--nproc", "2", "--nnodes", "2"), "2 nodes need a place to meet; add --rdzv-endpoint"),
        (("--nproc", "2", "--nnodes", "2", "--rdzv-endpoint", "a:1"), "name it with --run-dir"),
        (("--nproc", "2", "--nnodes", "2", "--rdzv-endpoint", "a:b"), "'a:b': expected HOST:PORT, such as a:29500"),
        (("--max-restarts", "1"), "need --nproc"),
        (("--nproc", "2", "--jobs", "2"), "--jobs is for studies"),
    ],
)
def test_mistakes_are_found_before_anything_starts(tiny, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["run", str(tiny()), "batch.global=4", "batch.per_rank=2", *arguments])
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "runs").exists()


def test_places():
    assert Launch(nproc=4, nnodes=2, endpoint="a:1").ranks == 8
    with pytest.raises(DistributedError, match="--node-rank 2 is not among 2 nodes"):
        Launch(nproc=1, nnodes=2, node_rank=2, endpoint="a:1")
    assert processes("12") == 12
    with pytest.raises(DistributedError, match="0 processes on each of 1 nodes, 0 restarts: expected at least one process"):
        Launch(nproc=0)
