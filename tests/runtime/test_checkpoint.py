"""A checkpoint is whole or invisible, and what cannot be loaded is said plainly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sftk.errors import CheckpointError
from sftk.runtime.checkpoint import checkpoint_step, last_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint


def save(folder, step, value=1.0, keep=2):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    return save_checkpoint(
        folder, step, {"generator": model}, {"step": step, "tensor": torch.ones(3), "deep": [{"a": 1.5}]}, keep
    )


def test_round_trip(tmp_path):
    path = save(tmp_path / "deep" / "dmd", 12, value=0.25)
    assert path == tmp_path / "deep" / "dmd" / "step_00000012"
    assert sorted(file.name for file in path.iterdir()) == ["generator.safetensors", "training.pt"]
    model = nn.Linear(2, 1)
    training = load_checkpoint(path, {"generator": model})
    assert model.weight.tolist() == [[0.25, 0.25]]
    assert (training["step"], training["deep"], training["tensor"].tolist()) == (12, [{"a": 1.5}], [1.0] * 3)
    assert checkpoint_step(path) == 12


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 9, 10, 100):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000100"]
    save(tmp_path, 101, keep=1)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [101]


def test_what_was_not_renamed_is_not_there(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    (tmp_path / ".writing-00000007").mkdir()
    (tmp_path / "step_7").mkdir()
    assert last_checkpoint(tmp_path) is None
    path = save(tmp_path, 3)
    assert last_checkpoint(tmp_path) == path
    assert not (tmp_path / ".writing-00000007").exists()


@pytest.mark.parametrize("part", ["generator.safetensors", "training.pt"])
def test_a_failed_write_leaves_the_older_one(tmp_path, part, monkeypatch):
    older = save(tmp_path, 3, value=3.0)
    monkeypatch.setattr(*(("sftk.runtime.checkpoint.save_weights", fail) if part != "training.pt" else ("torch.save", fail)))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 4)
    assert list_checkpoints(tmp_path) == [older]
    monkeypatch.undo()
    assert [checkpoint_step(save(tmp_path, 4))] == [4]


def fail(*_, **__):
    raise OSError("disk full")


def test_the_same_step_twice_keeps_the_newer(tmp_path):
    save(tmp_path, 3, value=1.0)
    path = save(tmp_path, 3, value=2.0)
    model = nn.Linear(2, 1)
    load_checkpoint(path, {"generator": model})
    assert model.weight.tolist() == [[2.0, 2.0]]


def test_what_is_broken_is_named(tmp_path):
    path = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"no weight file .*critic.safetensors"):
        load_checkpoint(path, {"critic": nn.Linear(2, 1)})
    with pytest.raises(CheckpointError, match=r"shape of weight: the file has \[1, 2\], the model \[1, 3\]"):
        load_checkpoint(path, {"generator": nn.Linear(3, 1)})
    (path / "training.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"training.pt cannot be read"):
        load_checkpoint(path, {})
    with pytest.raises(CheckpointError, match="expected a name such as step_00000120"):
        checkpoint_step(tmp_path / "last")


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_training_state_is_read_without_running_code(tmp_path, capsys):
    path = save(tmp_path, 3)
    torch.save({"evil": Evil()}, path / "training.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path, {})
    assert capsys.readouterr().out == ""
