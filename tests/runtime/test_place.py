"""What a launcher's environment says of a process."""

from __future__ import annotations

import pytest

from sftk.errors import DistributedError
from sftk.runtime.place import Place, find_place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "100007",
}


def test_a_step_of_srun():
    assert find_place(SRUN) == Place(rank=5, size=8, local_rank=1, node=4, host="gpu03", port=20007)
    assert find_place(SRUN | TORCHRUN).host == "a"  # torchrun inside a step


def test_torchrun_without_local_sizes_is_one_node():
    assert find_place(TORCHRUN) == Place(rank=5, size=8, local_rank=5, node=8, host="a", port=1)


def test_a_process_by_itself_and_a_batch_script():
    assert find_place({}) is None
    assert find_place({name: SRUN[name] for name in ("SLURM_PROCID", "SLURM_LOCALID")} | {"SLURM_NTASKS": "8"}) is None


def test_half_an_environment_is_an_error():
    with pytest.raises(DistributedError, match="has RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        find_place({"RANK": "0"})
    with pytest.raises(DistributedError, match="WORLD_SIZE in the environment is 'two'"):
        find_place(TORCHRUN | {"WORLD_SIZE": "two"})
