"""The benchmark of sequence groups, at a tiny size, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_settings_agree():
    line = [sys.executable, "benchmarks/sequence_parallel.py", "--tiny", "--updates", "2", "precision=fp32"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    alone, *shared = (json.loads(row) for row in done.stdout.splitlines())
    assert alone["speedup"] == 1.0
    assert [(row["sequence"], row["shard"]) for row in shared] == [(2, "1"), (2, "all")]
    assert min(alone["losses"]) > 1e-4
    for row in shared:
        assert row["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert row["speedup"] > 0
