"""Loading in a process of its own: how much memory the host needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sftk.models import WanConfig, WanModel
from sftk.models.weights import save_weights

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from sftk.models import tensor_files
from sftk.models.formats import open_weights
from sftk.models.weights import build_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

path, dtype = Path(sys.argv[1]), sys.argv[2]
source = open_weights(path)
config = source.config()
before, found = peak(), []
for at_once in map(int, sys.argv[3:]):
    tensor_files.MAPPED_AT_ONCE = at_once
    model = build_model(config, weights=path, seed=0, dtype=dtype, backend="auto", device=torch.device("cpu"))
    total = sum(float(tensor.double().abs().sum()) for tensor in model.state_dict().values())
    found.append({"added": peak() - before, "file": source.bytes, "total": total})
    del model
print(json.dumps(found))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc/self/status")


FIXED = 48 << 20
"""Bytes that the first use of the libraries takes, whatever the file."""


def added(path: Path, dtype: str, *at_once: int) -> list[tuple[float, float]]:
    """Host memory that loading added at most (but for `FIXED`), as a share of the file, and the weights' absolute sum.

    Args:
        at_once: bytes that are mapped together, in one load after the other; each load needs more than the one before.
    """
    command = [sys.executable, "-c", SCRIPT, str(path), dtype, *map(str, at_once)]
    loads = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [((load["added"] - FIXED) / load["file"], load["total"]) for load in loads]


@pytest.fixture(scope="module")
def model() -> WanModel:
    torch.manual_seed(0)
    return WanModel(WanConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=12, text_dim=256)).bfloat16()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_the_host_holds_the_model_and_a_small_part_of_the_file(model, tmp_path, kind):
    path = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}, path)
    else:
        save_weights(model, path)
    total = sum(float(tensor.double().abs().sum()) for tensor in model.state_dict().values())
    (few, sum_few), (everything, _) = added(path, "bf16", 8 << 20, 1 << 40)
    assert sum_few == pytest.approx(total, rel=1e-12)
    assert 0.5 < few < 1.1
    assert everything > 1.4  # what mapping the whole file at once would take
