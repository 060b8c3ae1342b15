"""Processes that are killed at any moment lose only the steps since the last checkpoint, and go on on any number of ranks."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from forked import start_rank

from sftk.runtime.checkpoint import checkpoint_files, last_checkpoint, list_checkpoints, read_facts
from sftk.runtime.interrupt import GO_ON_LATER

SLOW_DISK = """\
import time

from sftk.runtime import checkpoint_storage

plain = checkpoint_storage.sync


def sync(path):
    time.sleep(0.03)
    plain(path)


checkpoint_storage.sync = sync
"""


class Ranks:
    """`sftk run` in several processes, as torchrun or srun would start them."""

    def __init__(self, world: int, folder: Path, recipe: Path, *overrides: str, cwd: Path):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        self.folder, self.cwd = folder, cwd
        env = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        line = ["run", str(recipe), *overrides, "--run-dir", str(folder), "--resume"]
        self.processes = [start_rank(rank, "sftk", line, self.said(rank), env, cwd) for rank in range(world)]

    def said(self, rank: int) -> Path:
        return self.cwd / f"{self.folder.name}.{rank}.txt"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def end(self, code=0):
        for process in self.processes:
            process.join(300)
        codes = [process.exitcode for process in self.processes]
        errors = self.errors()
        assert codes == [code] * len(codes), errors
        return errors

    def errors(self):
        return [self.said(rank).read_text() for rank in range(len(self.processes))]

    def until(self, reached):
        deadline = time.monotonic() + 120
        while not reached():
            for process in self.processes:
                assert process.exitcode is None, self.errors()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / "tiny"

    def writing(self) -> bool:
        return any(self.checkpoints.glob(".writing-*/*"))


def tensors(folder):
    """Everything in the last checkpoint, whole."""
    from sftk.models.shard_files import read_shards
    from sftk.models.tensor_files import stream

    path = last_checkpoint(folder / "checkpoints" / "tiny")
    found = {}
    for part, file in checkpoint_files(path).items():
        found |= {f"{part}/{item.name}": tensor.clone() for item, tensor in stream(read_shards(file)[0].values())}
    return found, read_facts(path)


def assert_whole(folder):
    for path in list_checkpoints(folder):
        assert len(list(path.iterdir())) == 11, "five parts of two ranks, and the facts"
        assert all(item for item in checkpoint_files(path))
        assert read_facts(path)["loader"]["position"] > 0


@pytest.fixture
def recipe(tiny, tmp_path):
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
    change = "version: 1", "version: 1\nplugins: [slow_disk.py]", "start: 3", "start: 0"
    return tiny(*change)


OPTIONS = ("checkpoint.every=1", "batch.per_rank=1", "parallel.timeout=2.0")


def kill_and_go_on(recipe, tmp_path, steps, kills, seed):
    """Kills both ranks so often, finishes, and compares with an undisturbed run; returns how many kills hit a write."""
    options, moments, hits = (*OPTIONS, f"train.steps={steps}"), random.Random(seed), 0
    folder = tmp_path / "killed"
    with Ranks(2, tmp_path / "whole", recipe, *options, cwd=tmp_path) as whole:
        for kill in range(kills):
            with Ranks(2, folder, recipe, *options, cwd=tmp_path) as ranks:
                before = list_checkpoints(ranks.checkpoints)
                ranks.until(lambda ranks=ranks, before=before: list_checkpoints(ranks.checkpoints)[-1:] != before[-1:])
                if kill % 2:
                    time.sleep(moments.uniform(0, 0.5))
                else:
                    ranks.until(ranks.writing)
                    time.sleep(moments.uniform(0, 0.1))
                reached = list_checkpoints(ranks.checkpoints)[-1]
                ranks.kill()
                hits += ranks.writing()
                assert list_checkpoints(ranks.checkpoints)[-1] >= reached, "the newest checkpoint was lost"
                assert_whole(ranks.checkpoints)
        with Ranks(2, folder, recipe, *options, cwd=tmp_path) as ranks:
            ranks.end()
        whole.end()
    (mine, facts), (theirs, expected) = tensors(folder), tensors(tmp_path / "whole")
    assert facts == expected
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    metrics = [(path / "metrics.jsonl").read_bytes() for path in (folder, tmp_path / "whole")]
    assert metrics[0] == metrics[1]
    return hits


@pytest.mark.slow
def test_killed_inside_a_write_two_processes_go_on_bit_for_bit(recipe, tmp_path):
    assert kill_and_go_on(recipe, tmp_path, steps=6, kills=1, seed=0) == 1


@pytest.mark.slow
def test_twenty_kills_lose_nothing_but_steps(recipe, tmp_path):
    hits = kill_and_go_on(recipe, tmp_path, steps=90, kills=20, seed=1)
    assert 5 <= hits <= 20


def test_a_signal_to_one_rank_stops_all_at_one_step(recipe, tmp_path):
    """SIGUSR1 saves a checkpoint and ends with the code that asks to be started again."""
    with Ranks(2, tmp_path / "run", recipe, "train.steps=400", "checkpoint.every=1000", *OPTIONS[1:], cwd=tmp_path) as ranks:
        metrics = tmp_path / "run" / "metrics.jsonl"
        ranks.until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
        os.kill(ranks.processes[1].pid, signal.SIGUSR1)
        error, _ = ranks.end(GO_ON_LATER)
    (saved,) = list_checkpoints(ranks.checkpoints)
    assert f"stopped by SIGUSR1 after step {read_facts(saved)['step']}; saved {saved}; go on with --resume" in error
    assert metrics.read_bytes().count(b"\n") == read_facts(saved)["step"]


def go_on_with_fewer(tiny, train, tmp_path, worlds, per_world=2):
    """Trains so many steps on each number of ranks, one after the other, and all of them in one process."""
    constant = [f"optimizers.{role}.schedule=constant" for role in ("generator", "fake_score")]
    options = [*constant, "precision=fp64", "batch.global=4", "checkpoint.every=50", "ema.generator.start=1"]
    recipe, steps = tiny(), 0
    for world in worlds:
        steps += per_world
        with Ranks(
            world, tmp_path / "run", recipe, *options, "batch.per_rank=1", f"train.steps={steps}", cwd=tmp_path
        ) as ranks:
            ranks.end()
    train(recipe, *options, f"train.steps={steps}", to="whole")
    (mine, facts), (theirs, expected) = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert facts["loader"] == expected["loader"]
    assert facts["step"] == expected["step"] == steps
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-9), name


@pytest.mark.slow
def test_two_ranks_then_one(tiny, train, tmp_path):
    go_on_with_fewer(tiny, train, tmp_path, (2, 1))


@pytest.mark.slow
def test_four_ranks_then_two_then_one(tiny, train, tmp_path):
    go_on_with_fewer(tiny, train, tmp_path, (4, 2, 1), per_world=3)
