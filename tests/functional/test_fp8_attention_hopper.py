"""The attention kernel for Hopper, compiled without one: a GPU's tests say what it computes, this one that it still can."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOUND = importlib.util.find_spec("triton") is not None and importlib.util.find_spec("triton.experimental.gluon") is not None


@pytest.mark.skipif(not FOUND or sys.platform != "linux", reason="needs triton")
@pytest.mark.parametrize("dim", [64, 128])
def test_it_compiles_as_it_was_meant(dim, tmp_path):
    """No register is spilled, and no product waits for another: the assembler says so where it cannot keep them apart."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py")), str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", done.stdout), done.stdout
    assert "Potential Performance Loss" not in done.stdout, done.stdout
