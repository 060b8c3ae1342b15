"""A checkpoint is whole or invisible, is written while training goes on, and what cannot be loaded is said plainly."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sftk.errors import CheckpointError
from sftk.models.tensor_files import Stored
from sftk.runtime import checkpoint_saver
from sftk.runtime.build import Built
from sftk.runtime.checkpoint import begin, checkpoint_files, checkpoint_step, last_checkpoint, list_checkpoints, read_facts
from sftk.runtime.checkpoint_restore import restore
from sftk.runtime.checkpoint_saver import Saver, Staging
from sftk.runtime.checkpoint_state import Part, optimizer_parts, optimizer_state, shares, weight_parts
from sftk.runtime.checkpoint_storage import SHARES, PartsWriter
from sftk.runtime.mesh import Mesh


def linear(value=1.0):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    return model


def save(folder, step, value=1.0, keep=2):
    saver = Saver(folder, keep)
    target = saver.save(step, weight_parts({"generator": linear(value)}, step), {"loader": {"position": 3 * step}})
    saver.wait()
    return target


def built(models, optimizers):
    empty: dict[str, Any] = {field.name: {} for field in attrs.fields(Built)}
    return Built(**empty | {"modules": models, "optimizers": optimizers, "mesh": Mesh.single()})


def load(path, **models):
    restore(path, built(models, {}), models)


def test_round_trip(tmp_path):
    path = save(tmp_path / "deep" / "dmd", 12, value=0.25)
    assert path == tmp_path / "deep" / "dmd" / "step_00000012"
    assert sorted(file.name for file in path.iterdir()) == ["checkpoint.json", "generator.safetensors"]
    assert read_facts(path) == {"loader": {"position": 36}, "step": 12}
    assert load_file(path / "generator.safetensors")["weight"].tolist() == [[0.25, 0.25]]
    model = linear()
    load(path, generator=model)
    assert model.weight.tolist() == [[0.25, 0.25]]
    assert checkpoint_step(path) == 12


def test_optimizers_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)

    def make():
        model = linear()
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer, count):
        for _ in range(count):
            model(torch.tensor([[1.0, -2.0]])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    (model, optimizer), (idle, waiting) = make(), make()
    step(model, optimizer, 3)
    made = built({"generator": model, "critic": idle}, {"generator": optimizer, "critic": waiting})
    saver = Saver(tmp_path, 1)
    saver.save(3, weight_parts(made.modules, 3) | optimizer_parts(made), {})
    saver.wait()
    stored = load_file(tmp_path / "step_00000003" / "generator.optimizer.safetensors")
    assert sorted(stored) == [f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in ("bias", "weight")]
    assert (stored["step/bias"].shape, stored["step/bias"].item()) == (torch.Size([]), 3.0)
    (again, restored), (still, unused) = make(), make()
    restore(
        tmp_path / "step_00000003",
        built({"generator": again, "critic": still}, {"generator": restored, "critic": unused}),
        ["generator", "critic"],
    )
    assert not unused.state
    step(model, optimizer, 2)
    step(again, restored, 2)
    assert torch.equal(model.weight, again.weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg_sq"], restored.state[again.weight]["exp_avg_sq"])


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch, background):
    """What is written are the values at the call, not those of later updates."""
    go_on, plain = threading.Event(), PartsWriter.write_data

    def write_late(self, plan, planner):
        assert not background or go_on.wait(20)
        return plain(self, plan, planner)

    monkeypatch.setattr(PartsWriter, "write_data", write_late)
    saver, model = Saver(tmp_path, 2, background), linear(1.0)
    target = saver.save(1, weight_parts({"generator": model}, 1), {})
    assert target.exists() != background
    nn.init.constant_(model.weight, 7.0)
    go_on.set()
    saver.wait()
    assert load_file(target / "generator.safetensors")["weight"].tolist() == [[1.0, 1.0]]
    saver.save(2, weight_parts({"generator": model}, 2), {})
    saver.wait()
    assert load_file(tmp_path / "step_00000002" / "generator.safetensors")["weight"].tolist() == [[7.0, 7.0]]


def test_staging_keeps_its_memory_and_follows_a_changed_layout(monkeypatch):
    monkeypatch.setattr(checkpoint_saver, "BLOCK", 1024)
    tensors = {f"{i}": torch.full((i * 50,), float(i), dtype=torch.float64) for i in range(1, 6)}
    tensors["scalar"] = torch.tensor(3, dtype=torch.int64)
    staging = Staging()

    def stage():
        return staging.stage({SHARES: shares({"a": Part(tensors=tensors, metadata={})})})[SHARES]

    first = stage()
    places = [share.local.data_ptr() for share in first.values()]
    assert all(torch.equal(first[f"a/{name}"].local, tensor) for name, tensor in tensors.items())
    tensors["1"] += 1
    second = stage()
    assert [share.local.data_ptr() for share in second.values()] == places
    assert torch.equal(second["a/1"].local, tensors["1"])
    tensors["more"] = torch.ones(7, dtype=torch.bfloat16)
    third = stage()
    assert third["a/more"].local.dtype == torch.bfloat16
    assert all(torch.equal(third[f"a/{name}"].local, tensor) for name, tensor in tensors.items())


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 9, 10, 100):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000100"]
    save(tmp_path, 101, keep=1)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [101]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000101"]


def test_what_was_not_renamed_is_not_there(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    (tmp_path / ".writing-00000007").mkdir()
    (tmp_path / ".removing-step_00000001").mkdir()
    (tmp_path / "step_7").mkdir()
    assert last_checkpoint(tmp_path) is None
    path = save(tmp_path, 3)
    assert last_checkpoint(tmp_path) == path
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("part", ["save_file", "sync"])
def test_a_failed_write_leaves_the_older_one(tmp_path, part, monkeypatch):
    older = save(tmp_path, 3, value=3.0)
    monkeypatch.setattr(f"sftk.runtime.checkpoint_storage.{part}", fail)
    with pytest.raises(CheckpointError, match=r"step_00000004 could not be written: .*disk full; .*--resume"):
        save(tmp_path, 4)
    assert list_checkpoints(tmp_path) == [older]
    monkeypatch.undo()
    assert [checkpoint_step(save(tmp_path, 4))] == [4]


def fail(*_, **__):
    raise OSError("disk full")


def test_a_kill_between_any_two_changes_of_the_folder_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """Stops before each rename and removal in turn; whatever is visible can be loaded, and the newest never gets older."""

    class Killed(BaseException):
        pass

    for limit in range(12):
        folder, made = tmp_path / str(limit), []
        for step in (1, 2):
            save(folder, step, value=float(step))

        def counted(function, made=made, limit=limit):
            def call(*args, **kwargs):
                made.append(function.__name__)
                if len(made) > limit:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(os, "unlink", counted(os.unlink))
            patch.setattr(os, "rmdir", counted(os.rmdir))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            with contextlib.suppress(Killed, CheckpointError):
                save(folder, 3, value=3.0)
        visible = list_checkpoints(folder)
        assert visible[-1].name in ("step_00000002", "step_00000003")
        assert len(visible) >= 2
        for path in visible:
            model = linear()
            load(path, generator=model)
            assert model.weight[0, 0].item() == checkpoint_step(path)
    assert len(made) <= limit  # the last round was not stopped any more


def test_the_same_step_twice_keeps_the_newer(tmp_path):
    save(tmp_path, 3, value=1.0)
    path = save(tmp_path, 3, value=2.0)
    model = linear()
    load(path, generator=model)
    assert model.weight.tolist() == [[2.0, 2.0]]


def test_what_is_broken_is_named(tmp_path):
    path = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"has no weights of 'critic', only \['generator'\]"):
        load(path, critic=linear())
    with pytest.raises(CheckpointError, match=r"shape of weight: the file has \[1, 2\], the model \[1, 3\]"):
        load(path, generator=nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match=r"has no optimiser states of 'generator', only \['generator'\]"):
        restore(path, built({"generator": linear()}, {"generator": torch.optim.SGD(linear().parameters())}), ["generator"])
    with pytest.raises(CheckpointError, match=r"missing: 1.bias \[1\]"):
        load(path, generator=nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1)))
    file = path / "generator.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"generator.safetensors is not a whole safetensors file: it is truncated"):
        load(path, generator=linear())
    (path / "checkpoint.json").write_text("{half")
    with pytest.raises(CheckpointError, match=r"checkpoint.json cannot be read"):
        read_facts(path)
    (path / "checkpoint.json").write_text("[3]")
    with pytest.raises(CheckpointError, match="holds no mapping, but list; remove step_00000003, and the one before"):
        read_facts(path)
    with pytest.raises(CheckpointError, match="expected a name such as step_00000120"):
        checkpoint_step(tmp_path / "last")


def test_files_of_several_ranks_count_once(tmp_path):
    for name in ("a.safetensors", "b-00001-of-00002.safetensors", "b-00002-of-00002.safetensors", "checkpoint.json"):
        (tmp_path / name).touch()
    assert {part: file.name for part, file in checkpoint_files(tmp_path).items()} == {
        "a": "a.safetensors",
        "b": "b-00001-of-00002.safetensors",
    }


def test_nothing_pickled(tmp_path):
    path = save(tmp_path, 3)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    json.loads((path / "checkpoint.json").read_text())


def test_states_of_a_parameter_that_is_not_there(tmp_path):
    item = Stored(file=tmp_path / "a.optimizer.safetensors", name="exp_avg/weight_", dtype="F32", shape=(1, 2), bytes=8)
    model = linear()
    with pytest.raises(CheckpointError, match=r"an optimiser state 'exp_avg' of 'weight_', .*; did you mean 'weight'"):
        optimizer_state(torch.optim.AdamW(model.parameters()), model, {"exp_avg/weight_": item})


def test_begin_makes_an_empty_folder(tmp_path):
    begin(tmp_path / "dmd", 7)
    assert [path.name for path in (tmp_path / "dmd").iterdir()] == [".writing-00000007"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a file system needs more rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_said_with_file_and_room(small_disk, background):
    older = save(small_disk, 3)
    large = nn.Linear(1024, 512)
    saver = Saver(small_disk, 2, background)
    saver.save(4, weight_parts({"critic": large}, 4), {})
    text = r"step_00000004 could not be written: critic\.safetensors \(0\.00 GiB\): .*No space left on device.*"
    with pytest.raises(CheckpointError, match=text + r"0\.00 GiB are left there; make room, .*checkpoint\.keep.*--resume"):
        saver.wait()
    assert list_checkpoints(small_disk) == [older]
    saver.save(5, weight_parts({"generator": linear()}, 5), {})  # room was made
    saver.wait()
    assert [checkpoint_step(path) for path in list_checkpoints(small_disk)] == [3, 5]


def test_a_limit_on_file_sizes_is_said(tmp_path):
    """In a process of its own, whose files may have 4 KiB."""
    code = (
        "import resource, signal, sys; from torch import nn; from pathlib import Path\n"
        "from sftk.runtime.checkpoint_saver import Saver; from sftk.runtime.checkpoint_state import weight_parts\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "saver = Saver(Path(sys.argv[1]), 2); saver.save(1, weight_parts({'critic': nn.Linear(64, 64)}, 1), {}); saver.wait()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "step_00000001 could not be written: critic.safetensors (0.00 GiB): " in last
    assert "File too large" in last
    assert "ulimit -f" in last
