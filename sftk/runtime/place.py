"""What a launcher's environment says of this process: torchrun's variables, or those of a step of Slurm."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import attrs

from sftk.errors import DistributedError

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@attrs.frozen(kw_only=True)
class Place:
    """Where a launcher put this process.

    Args:
        rank, size: of the run. local_rank: on this node. node: processes on this node.
        host, port: where the processes meet.
    """

    rank: int
    size: int
    local_rank: int
    node: int
    host: str
    port: int


def find_place(env: Mapping[str, str]) -> Place | None:
    """What the environment says of this process; None for one that runs by itself.

    `torchrun` sets RANK and its like, `srun` SLURM_PROCID and its like for each step. A shell of a Slurm job has no step of
    its own and counts as one process.

    Raises:
        DistributedError: torchrun's variables are there in part, or are no numbers.

    Example:
        >>> find_place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        ...     "MASTER_ADDR": "gpu-1", "MASTER_PORT": "29500"})
        Place(rank=3, size=4, local_rank=1, node=2, host='gpu-1', port=29500)
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in TORCHRUN if name not in env]
        if missing:
            found = " and ".join(name for name in TORCHRUN if name in env)
            message = f"the environment has {found} but not {', '.join(missing)}"
            raise DistributedError(f"{message}; start with `sftk run --nproc`, torchrun or srun, which set them all")
        rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        node = _number(env, "LOCAL_WORLD_SIZE", size)
        local = _number(env, "LOCAL_RANK", rank % node)
        return Place(
            rank=rank, size=size, local_rank=local, node=node, host=env["MASTER_ADDR"], port=_number(env, "MASTER_PORT")
        )
    if all(name in env for name in SLURM) and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        node = int(re.split(r"[,(]", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))[0])
        return Place(
            rank=_number(env, "SLURM_PROCID"),
            size=_number(env, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(env, "SLURM_LOCALID"),
            node=node,
            host=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
            port=_number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000),
        )
    return None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    Example:
        >>> first_host("gpu[003-010,12],cpu1"), first_host("a-1,a-2")
        ('gpu003', 'a-1')
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    assert match is not None, f"Slurm gave an empty node list {nodes!r}"
    return match[1] + (match[2] or "")


def restarts() -> int:
    """How often torchrun's agent has started this process again after a failure.

    Example:
        >>> restarts()
        0
    """
    return _number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name, default)
    try:
        return int(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise DistributedError(f"{name} in the environment is {value!r}; expected a number") from None
