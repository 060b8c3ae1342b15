"""The scripts that measure on a GPU run as they stand, at a tiny size on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "benchmarks"


def lines(script: str, *arguments: str) -> list[dict]:
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=FOLDER.parent)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_plan_check():
    found = lines("plan_check.py", "--tiny")
    assert [line["setting"] for line in found] == ["3 frames", "21 frames", "3 frames without checkpoints"]
    for line in found:
        assert line["planned_gib"] > 0
        assert set(line["measured_seconds"]) == set(line["planned_seconds"]) == {"generator and critic", "critic"}


def test_lowp():
    (found,) = lines("lowp.py", "--tiny", "--device", "cpu", "--repeats", "1")
    rows = {row["setting"]: row for row in found["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    assert set(rows["full"]["errors"].values()) == {0}
    assert rows["full"]["weights"]["all"] == rows["fp8"]["weights"]["all"] == 0  # `linears` leaves calls with gradient alone
    assert rows["fp8_training"]["errors"]["x0"] == rows["fp8_training"]["errors"]["gradient"] == 0
    assert 0.001 < rows["fp8_training"]["weights"]["all"] < 0.2
    assert rows["fp8_training"]["weights"]["worst"] > rows["fp8_training"]["weights"]["median"] > 0
    for name in ("fp8_student", "kv_int8", "all"):
        assert 0 < rows[name]["errors"]["x0"] < 0.05
    assert rows["fp8_scores"]["errors"]["x0"] == 0
    assert rows["kv_int8"]["x0_by_block"][0] == 0  # the first block has no context
    assert 0 < rows["fp8"]["errors"]["gradient"] < 0.5


def test_elementwise():
    """Kernels need Triton; without it, a row says so."""
    (found,) = lines("elementwise.py", "--tiny", "--forms", "plain,halves", "--frames", "3", "--repeats", "2")
    rows = {(row["piece"], row["mode"], row["form"]): row for row in found["rows"]}
    assert len(rows) == 2 * 2 + 4 * 2 + 1  # norm_rope in both forms; five more pieces, the last of which is a gradient already
    assert all(0 < row["error"] < 0.01 and row["microseconds"] > 0 for row in rows.values())
    # q and k, 12 tokens of 96 channels in bfloat16, read and written; two weights; two tables of 16 angles a token.
    assert rows["norm_rope", "forward", "plain"]["least_bytes"] == 4 * 12 * 96 * 2 + 2 * 96 * 4 + 2 * 12 * 16 * 4


def test_fp8_linear():
    (found,) = lines("fp8_linear.py", "--tiny", "--device", "cpu", "--repeats", "2")
    rows = {(row["tokens"], row["in"], row["out"], row["piece"]): row for row in found["rows"]}
    assert len(rows) == 2 * 3 * 9
    for (tokens, read, returned, piece), row in rows.items():
        assert row["microseconds"] > 0
        if piece.endswith("forward"):
            assert row["flop"] == 2 * tokens * read * returned
        if piece == "fp8 forward":
            assert 0.01 < row["error"] < 0.05


def test_load_14b(tmp_path):
    folder = tmp_path / "wan"
    for _ in range(2):  # the second one loads what is there
        (found,) = lines("load_14b.py", str(folder), "--size", "1.3b", "--layers", "1", "--device", "cpu", "--shard-gb", "0.05")
        assert 40e6 < found["parameters"] < 100e6
        assert found["file_bytes"] >= 2 * found["parameters"]
        assert found["host_peak_bytes"] >= found["host_peak_before_bytes"] > 0
    assert len(list(folder.glob("*.safetensors"))) > 1
