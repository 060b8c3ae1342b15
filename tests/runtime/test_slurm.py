"""The batch script is run by bash against stand-ins for Slurm's commands: restarts, and the queue before the time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftk.cli.main import main
from sftk.errors import SftkError
from sftk.runtime.slurm import SlurmJob, batch_script

SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "$*" >> scontrol.txt; fi
"""


@pytest.fixture
def submit(tmp_path):
    """`submit(script, srun)`: starts a batch script in tmp_path; `srun` is what Slurm's command does there."""
    started = []

    def start(script: str, srun: str) -> subprocess.Popen:
        (tmp_path / "bin").mkdir()
        for name, text in (("srun", f"#!/bin/bash\n{srun}"), ("scontrol", SCONTROL)):
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "job.sbatch").write_text(script)
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        env |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41234", "SLURM_NODEID": "1"}
        process = subprocess.Popen(["bash", "job.sbatch"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def script(**options):
    return batch_script("my recipe.yaml", ["seed=3"], Path("runs/a"), SlurmJob(name="dmd", nodes=2, gpus=4, **options))


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_bash_reads_it(launcher):
    text = script(launcher=launcher, setup=("source venv/bin/activate",), account="lab")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    head = text.split("\n\n")[0].splitlines()
    assert head[0] == "#!/bin/bash"
    assert all(line.startswith("#SBATCH --") for line in head[1:])
    asked = {"--nodes=2", "--gpus-per-node=4", "--signal=B:USR1@300", "--account=lab", "--requeue", "--time=24:00:00"}
    asked |= (
        {"--ntasks-per-node=4", "--cpus-per-task=8"} if launcher == "srun" else {"--ntasks-per-node=1", "--cpus-per-task=32"}
    )
    assert asked <= {line.removeprefix("#SBATCH ") for line in head[1:]}
    assert "partition" not in text
    assert "source venv/bin/activate" in text


def test_failures_are_started_again(submit, tmp_path):
    process = submit(script(), 'echo "$MASTER_ADDR $MASTER_PORT $*" >> calls.txt; [ "$(wc -l < calls.txt)" -ge 3 ]')
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    called = "node7 21234 --kill-on-bad-exit=1 python -m sftk run my recipe.yaml seed=3 --run-dir runs/a --resume"
    assert calls == [called] * 3
    assert error.splitlines() == ["attempt 1 of 3 after exit code 1", "attempt 2 of 3 after exit code 1"]
    assert not (tmp_path / "scontrol.txt").exists()


def test_the_last_failure_is_the_job_s(submit, tmp_path):
    process = submit(script(restarts=1), "echo x >> calls.txt; exit 9")
    process.communicate(timeout=20)
    assert process.returncode == 9
    assert (tmp_path / "calls.txt").read_text() == "x\nx\n"


def test_the_notice_saves_and_queues_again(submit, tmp_path):
    process = submit(script(), "trap 'sleep 0.3; exit 75' USR1; touch up; while true; do sleep 0.05; done")
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 41234\n"


def test_agents_of_torchrun(submit, tmp_path):
    run = 'shift; (python() { printf "%s|" "$@" > calls.txt; }; export -f python; eval "$(printf "%q " "${@/exec /}")")'
    process = submit(script(launcher="torchrun", restarts=2), run)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    called = "-m|sftk|run|my recipe.yaml|seed=3|--run-dir|runs/a|--resume|--nproc|4|--nnodes|2|"
    ends = "--rdzv-endpoint|node7:21234|--max-restarts|2|--node-rank|1|"
    assert (tmp_path / "calls.txt").read_text() == called + ends


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["slurm", "recipes/dmd.yaml", "seed=2", "--nodes", "2", "--gpus", "2", "--time", "1-00", "--run-dir", "out"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "dmd.sbatch: submit with `mkdir -p out && sbatch dmd.sbatch`" in result.output
    assert "sftk run recipes/dmd.yaml seed=2 --run-dir out --resume" in Path("dmd.sbatch").read_text()
    bad = CliRunner().invoke(main, ["slurm", "recipes/dmd.yaml", "--gpus", "3"])
    assert bad.exit_code == 2
    assert "16" in bad.output


def test_senseless_times():
    with pytest.raises(SftkError, match=r"time 'a day': expected minutes"):
        SlurmJob(name="a", time="a day")
    with pytest.raises(SftkError, match=r"notice of 300 s in a job of 300 s"):
        SlurmJob(name="a", time="5")


def test_what_slurm_would_read_otherwise():
    with pytest.raises(SftkError, match=r"partition 'a b' has a blank"):
        SlurmJob(name="a", partition="a b")
    with pytest.raises(SftkError, match="gpus 0 of a batch script: expected at least 1"):
        SlurmJob(name="a", gpus=0)
    with pytest.raises(SftkError, match=r"run_dir 'my runs/a' has a blank"):
        batch_script("a.yaml", [], Path("my runs/a"), SlurmJob(name="a"))
