"""The benchmark of checkpoints runs at a small size, and its numbers make sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoint.py"
SMALL = ("latents={frames: 3, channels: 4, height: 8, width: 8}", "data={use: digits}", "phases.generator.every=1")


def test_small(tmp_path):
    sizes = [f"models.{role}.size=digits" for role in ("generator", "real_score", "fake_score")]
    line = [sys.executable, str(SCRIPT), str(tmp_path / "saved"), *SMALL, *sizes, "precision=fp32", "--steps", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 1
    assert found["bytes"] > 2 * 3 * 4 * 300_000, "two trained models, each with two moments in float32"
    assert 0 < found["second"]["copy_seconds"] <= found["second"]["held_up_seconds"]
    assert found["second"]["seconds_until_visible"] >= found["second"]["copy_seconds"]
    assert found["step_seconds"] > 0
    assert found["restore_seconds"] > 0
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["step_00000002", "step_00000003"]
