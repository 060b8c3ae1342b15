from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path


def test_the_script_runs_and_prints_a_number():
    script = Path(__file__).with_name("bench_graph_overhead.py")
    done = subprocess.run([sys.executable, str(script), "--repeats", "20"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert all(math.isfinite(value) for value in found.values())
    assert found["us_per_10_nodes"] > 0
    assert found["us_per_10_nodes_tensordict"] > found["us_per_10_nodes"]
