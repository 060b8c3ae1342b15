"""Two hosts, as network namespaces with addresses of their own; one is lost in mid-run and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sftk.models.shard_files import read_shards
from sftk.models.tensor_files import stream
from sftk.runtime.checkpoint import checkpoint_files, last_checkpoint, list_checkpoints

pytestmark = pytest.mark.slow
NAMES = [f"sftk{os.getpid() % 10000}{letter}" for letter in "ab"]
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """Two namespaces, joined by a pair of virtual interfaces; nothing else is reachable from them."""
    made = []
    try:
        for name in NAMES:
            ip("netns", "add", name)
            made.append(name)
        one, other = (f"v{name}" for name in NAMES)
        ip("link", "add", one, "netns", NAMES[0], "type", "veth", "peer", "name", other, "netns", NAMES[1])
        for name, interface, address in zip(NAMES, (one, other), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    yield tuple(zip(NAMES, (one, other), strict=True))
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False)


class Host:
    """`sftk run` on one of two hosts, in a session of its own: losing the host kills everything on it."""

    def __init__(self, host: tuple[str, str], rank: int, recipe: Path, folder: Path, cwd: Path, attempt: str):
        (name, interface), self.said = host, cwd / f"{folder.name}.{rank}.{attempt}.txt"
        launcher = ["--nproc", "1", "--nnodes", "2", "--node-rank", str(rank), "--max-restarts", "3"]
        meet = ["--rdzv-endpoint", f"{ADDRESSES[0]}:29511", "--run-dir", str(folder)]
        line = ["ip", "netns", "exec", name, sys.executable, "-m", "sftk", "run", str(recipe), *launcher, *meet, "--resume"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface, "HOST": name}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(line, cwd=cwd, env=env, stdout=said, stderr=said, start_new_session=True)
        self.name = name

    def lose(self):
        """Kills every process in the namespace at once, as when power fails."""
        pids = ip("netns", "pids", self.name).stdout.split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait()

    def end(self):
        assert self.process.wait(timeout=400) == 0, self.said.read_text()


def tensors(folder):
    found = {}
    for part, file in checkpoint_files(last_checkpoint(folder / "checkpoints" / "tiny")).items():
        found |= {f"{part}/{item.name}": tensor.clone() for item, tensor in stream(read_shards(file)[0].values())}
    return found


def test_a_lost_host_comes_back(hosts, tiny, train, tmp_path):
    changes = ["every: 2}\ntrack", "every: 5}\ntrack", "global: 2}", "global: 2, per_rank: 1}", "steps: 4}", "steps: 60}"]
    recipe = tiny(*changes, "seed: 3", "seed: 3\nprecision: fp64\nparallel: {timeout: 1.0}", "start: 3", "start: 1")
    folder = tmp_path / "lost"
    checkpoints = folder / "checkpoints" / "tiny"
    first, second = (Host(host, rank, recipe, folder, tmp_path, "a") for rank, host in enumerate(hosts))
    try:
        deadline = time.monotonic() + 200
        while len(list_checkpoints(checkpoints)) < 2:
            assert first.process.poll() is None, first.said.read_text()
            assert time.monotonic() < deadline, first.said.read_text() + second.said.read_text()
            time.sleep(0.01)
        lost_at = int(last_checkpoint(checkpoints).name[-8:])
        assert lost_at < 60
        second.lose()
        second = Host(hosts[1], 1, recipe, folder, tmp_path, "b")
        for host in (first, second):
            host.end()
    finally:
        first.lose()
        second.lose()
    whole = train(recipe, to="whole")
    mine, theirs = tensors(folder), tensors(whole.root)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-9), name
