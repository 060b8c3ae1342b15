"""Child processes: their logs, threads, signals, and a lock that outlives a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sftk.errors import SftkError
from sftk.runtime import jobs
from sftk.runtime.jobs import Job, available_threads, locked


@pytest.fixture
def python(monkeypatch, tmp_path):
    """`python(code, **options)`: a job that runs code instead of `sftk`."""
    started = []

    def start(code, threads=1, **options):
        script = tmp_path / f"script{len(started)}.py"
        script.write_text(code)
        monkeypatch.setattr(jobs, "_COMMAND", [sys.executable])
        job = Job([str(script)], tmp_path / "folder" / "log.txt", threads=threads, **options)
        started.append(job)
        return job

    yield start
    for job in started:
        job.signal(signal.SIGKILL)
        job.wait()


def test_log_and_threads(python, tmp_path):
    assert python("import os; print('one', os.environ['OMP_NUM_THREADS'])", threads=3).wait() == 0
    again = python("import sys; print('two'); print('lost', file=sys.stderr); sys.exit(4)")
    assert again.wait() == 4
    assert again.tail() == ["two", "lost"]
    assert again.tail(1) == ["lost"]
    long = python("print('before\\nerror: 20 problems'); [print(' ', i) for i in range(20)]")
    assert long.wait() == 0
    assert long.tail(3) == ["error: 20 problems", "  0", "  1"]
    lines = (tmp_path / "folder" / "log.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ sftk ")][:3] == ["one 3", "two", "lost"]
    assert len([line for line in lines if line.startswith("$ sftk ")]) == 3


def test_a_signal_ends_it_once(python):
    job = python("import time; time.sleep(60)")
    assert job.poll() is None
    job.signal(signal.SIGTERM)
    assert job.wait() == -signal.SIGTERM
    job.signal(signal.SIGTERM)  # it is gone: nothing happens


def test_it_is_in_a_group_of_its_own_so_that_ctrl_c_does_not_reach_it_twice(python):
    job = python("import time; time.sleep(60)")
    assert os.getpgid(job.pid) == job.pid != os.getpgid(0)


def test_threads_to_divide(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert available_threads() == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert available_threads() >= 1


def test_a_folder_is_kept_for_one_and_for_the_children_of_a_killed_one(tmp_path):
    with locked(tmp_path / "lock") as (held,):
        assert held > 2
        with pytest.raises(SftkError, match="is in use by another `sftk run`"), locked(tmp_path / "lock"):
            pass
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(held,))
    try:
        with pytest.raises(SftkError, match="left behind"), locked(tmp_path / "lock"):
            pass
    finally:
        child.kill()
        child.wait()
    deadline = time.monotonic() + 10
    while True:
        try:
            with locked(tmp_path / "lock"):
                break
        except SftkError:
            assert time.monotonic() < deadline
