"""The eight-GPU run: what it measures, that a setting fails alone, and all of it at a tiny size over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ("--tiny", "--device", "cpu", "--nproc", "2")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("eight_gpus", FOLDER / "eight_gpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["eight_gpus"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def run(*arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    line = ["sh", str(FOLDER / "eight_gpus.sh"), *TINY, *arguments]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(row) for row in done.stdout.splitlines()]


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_settings_share_the_node(script, gpus):
    rounds = list(script.rounds(gpus, "abcd"))
    assert max(sum(setting.ranks for setting in settings) for settings in rounds) == gpus
    found = {(s.part, s.ranks, s.sequence, s.shard) for settings in rounds for s in settings}
    degrees = [n for n in (1, 2, 4, 8) if n <= gpus]
    assert found >= {("a", n, 1, n) for n in degrees} | {("c", n, n, 1) for n in degrees}
    assert found >= {("b", gpus, n, gpus) for n in degrees[1:]} | {("d", gpus, gpus, gpus)}
    assert {s for s in found if s[0] == "a" and s[1] != s[3]} == {("a", n, 1, n // 2) for n in degrees if n >= 4}
    for settings in rounds:
        for setting in settings:
            stage = setting.stage([])
            assert stage.recipe.batch.split(setting.ranks // setting.sequence) == (1, 1)
            assert stage.recipe.models["generator"].config.dim == (1536 if setting.part == "a" else 5120)


def test_weak_scaling_and_speed_up(script):
    one = {"part": "a", "ranks": 1, "shard": 1, "seconds": {"generator": [9.0], "critic": [4.0]}}
    eight = {"part": "a", "ranks": 8, "shard": 8, "seconds": {"generator": [10.0], "critic": [5.0]}}
    halves = {"part": "a", "ranks": 8, "shard": 4, "problem": "no time was left"}
    rollouts = [{"part": "c", "ranks": n, "shard": 1, "seconds": [12.0 / n, 13.0 / n]} for n in (1, 4)]
    assert script.summary([one, eight, halves, *rollouts]) == {
        "part": "summary",
        "weak_scaling": {"fsdp x 1": {"generator": 1.0, "critic": 1.0}, "fsdp x 8": {"generator": 0.9, "critic": 0.8}},
        "rollout_speedup": {1: 1.0, 4: 4.0},
    }


@pytest.mark.slow
def test_everything_at_a_tiny_size(tmp_path):
    *rows, last = run("--out", str(tmp_path / "rows"), "precision=fp32")
    assert [(row["part"], row["ranks"]) for row in rows] == [("b", 2), ("c", 2), ("c", 1), ("a", 1), ("a", 2), ("d", 2)]
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == [*rows, last]
    for row in rows:
        assert "problem" not in row
        assert row["planned"]
    shared, alone = rows[0], rows[3]
    assert shared["losses"]["critic"] == pytest.approx(alone["losses"]["critic"], rel=1e-3), "the same sample"
    checkpoint = rows[-1]
    assert checkpoint["bytes"] == pytest.approx(2 * checkpoint["planned"]["bytes_of_a_rank"], rel=0.01)
    assert 0 < checkpoint["copy_seconds"] <= checkpoint["held_up_seconds"]
    assert last["rollout_speedup"]["1"] == 1.0


@pytest.mark.slow
def test_a_setting_that_fails_leaves_the_others():
    rows = run("--parts", "b,d", "data.use=nothing")
    assert ["problem" in row for row in rows] == [True, True, False]
    assert "nothing" in rows[0]["problem"]
    (stopped, _) = run("--parts", "b", "--seconds", "3")
    assert stopped["problem"].startswith("stopped after")
    assert stopped["planned"]["fits"] is True
    assert run("--parts", "d", "--seconds", "0")[0]["problem"] == "no time was left"
