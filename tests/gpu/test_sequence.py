"""Sequence groups over NCCL: two GPUs compute what one does."""

from __future__ import annotations

import pytest
import torch
from sequence_cases import assert_equal, launch, run_alone

NAMES = ("bidirectional", "one_timestep", "rollout_sink", "rollout_relative", "replay_sink", "dmd", "discriminator", "compiled")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one_alone(tmp_path):
    launch(tmp_path, [2], NAMES, device="cuda")
    with torch.device("cuda"):
        alone = {name: run_alone(name, 2) for name in NAMES}
    for name, expected in alone.items():
        assert_equal(torch.load(tmp_path / f"{name}_2.pt"), expected)
