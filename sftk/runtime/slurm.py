"""Batch scripts for Slurm: a job that trains a recipe, goes on after failures, and is queued again before its time is over."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import attrs

from sftk.errors import SftkError
from sftk.runtime.interrupt import GO_ON_LATER

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@attrs.frozen(kw_only=True)
class SlurmJob:
    """What a job asks for.

    Args:
        name: of the job.
        nodes: how many.
        gpus: of each node, and processes on it.
        cpus: of each process.
        time: limit of the job, as Slurm writes it, such as 24:00:00 or 2-00.
        notice: seconds before the limit at which a checkpoint is saved and the job queued again.
        restarts: how often the processes are started again, from the last checkpoint, when one dies.
        launcher: `srun` starts every process; `torchrun` starts one agent on each node, which starts the node's processes.
        partition, account, qos: where it is queued; empty leaves them to the cluster.
        setup: shell lines that run first on the first node, such as `source venv/bin/activate`.

    Raises:
        SftkError: a time that Slurm does not know, a notice that is not shorter than it, a name with a blank, a number below 1.

    Example:
        >>> SlurmJob(name="dmd", time="30", notice=3600)
        Traceback (most recent call last):
        sftk.errors.SftkError: notice of 3600 s in a job of 1800 s: each job would save and be queued again at once; shorten it
    """

    name: str
    nodes: int = 1
    gpus: int = 8
    cpus: int = 8
    time: str = "24:00:00"
    notice: int = 300
    restarts: int = 3
    launcher: Literal["srun", "torchrun"] = "srun"
    partition: str = ""
    account: str = ""
    qos: str = ""
    setup: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        seconds = limit_seconds(self.time)
        if 0 < seconds <= self.notice:
            found = f"notice of {self.notice} s in a job of {seconds} s"
            raise SftkError(f"{found}: each job would save and be queued again at once; shorten it")
        for field in ("nodes", "gpus", "cpus"):
            if getattr(self, field) < 1:
                raise SftkError(f"{field} {getattr(self, field)} of a batch script: expected at least 1")
        for field in ("name", "partition", "account", "qos"):
            _one_word(field, getattr(self, field))


def limit_seconds(time: str) -> int:
    """Seconds of a time limit as Slurm writes it; 0 is none.

    Raises:
        SftkError: it is none.

    Example:
        >>> [limit_seconds(time) for time in ("90", "90:30", "24:00:00", "2-00", "1-12:30")]
        [5400, 5430, 86400, 172800, 131400]
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise SftkError(f"time {time!r}: expected minutes, h:mm:ss or days-hours, such as 24:00:00")
    days, *rest = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:  # minutes and seconds; with days or three parts it begins with hours
        rest = [0, *rest[:2]]
    hours, minutes, seconds = rest
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _one_word(place: str, text: str) -> None:
    """Slurm ends a value at a blank."""
    if re.search(r"\s", text):
        raise SftkError(f"{place} {text!r} has a blank, at which Slurm ends a value in a batch script; take another")


def batch_script(recipe: str, overrides: Sequence[str], run_dir: Path, job: SlurmJob) -> str:
    """The text of a script for `sbatch`.

    Args:
        recipe: the file, as `sftk run` takes it from the folder that the job is submitted in.
        overrides: `key.path=value`.
        run_dir: the run's folder, which all nodes see.
        job: what it asks for.

    Raises:
        SftkError: the run's folder has a blank in its name, which Slurm does not take for a log.

    Example:
        >>> script = batch_script("dmd.yaml", ["seed=1"], Path("runs/a"), SlurmJob(name="dmd", nodes=2))
        >>> script.splitlines()[0], "--nodes=2" in script, "run dmd.yaml seed=1 --run-dir runs/a --resume" in script
        ('#!/bin/bash', True, True)
    """
    _one_word("run_dir", str(run_dir))
    asked = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus if job.launcher == "srun" else 1,
        "gpus-per-node": job.gpus,
        "cpus-per-task": job.cpus if job.launcher == "srun" else job.cpus * job.gpus,
        "time": job.time,
        "signal": f"B:USR1@{job.notice}",
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "output": f"{run_dir}/slurm-%j.log",
    }
    options = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value != ""]
    command = shlex.join(["run", recipe, *overrides, "--run-dir", str(run_dir), "--resume"])
    return _SCRIPT.format(
        options="\n".join(options),
        setup="\n".join(job.setup),
        notice=job.notice,
        restarts=job.restarts if job.launcher == "srun" else 0,
        later=GO_ON_LATER,
        start=_START[job.launcher].format(command=command, gpus=job.gpus, nodes=job.nodes, restarts=job.restarts),
    )


_START = {
    "srun": "srun --kill-on-bad-exit=1 python -m sftk {command} &",
    "torchrun": """\
srun --kill-on-bad-exit=1 bash -c 'exec python -m sftk "$@" --node-rank "$SLURM_NODEID"' sftk \\
        {command} \\
        --nproc {gpus} --nnodes {nodes} --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --max-restarts {restarts} &""",
}
_SCRIPT = """\
#!/bin/bash
{options}
#SBATCH --requeue
#SBATCH --open-mode=append

# Written by `sftk slurm`. Slurm makes no folders for logs: submit with the command that it printed.
set -u
{setup}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export PYTHONUNBUFFERED=1

# Slurm tells this shell {notice} seconds before the time is over; the processes then save a checkpoint and end with {later}.
requeue=no
step=
trap 'requeue=yes; [ -n "$step" ] && kill -USR1 "$step"' USR1

attempt=0
while true; do
    {start}
    step=$!
    while true; do
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break # a signal ends `wait` early
    done
    step=
    if [ "$requeue" = yes ] || [ "$code" -eq {later} ]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    [ "$code" -eq 0 ] && exit 0
    [ "$attempt" -ge {restarts} ] && exit "$code"
    attempt=$((attempt + 1))
    echo "attempt $attempt of {restarts} after exit code $code" >&2
done
"""
