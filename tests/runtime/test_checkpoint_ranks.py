"""Checkpoints of several ranks: written by each, loaded under any other sharding, by one process too, and exported offline."""

from __future__ import annotations

from pathlib import Path

import checkpoint_rank as job
import pytest
import torch
from forked import run_ranks

from sftk.errors import CheckpointError
from sftk.models.formats import open_weights
from sftk.models.shard_files import read_shards
from sftk.runtime.checkpoint import checkpoint_files
from sftk.runtime.checkpoint_restore import restore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("ranks")
    run_ranks(Path(job.__file__), [[str(rank), str(found)] for rank in range(4)], found)
    return found


@pytest.mark.parametrize("way", ["fsdp", "hsdp", "ddp"])
def test_one_process_goes_on_from_four(folder, way):
    path = folder / way / "step_00000002"
    assert sorted(file.name for file in path.iterdir()) == sorted(
        [f"{part}-0000{rank}-of-00004.safetensors" for part in ("net", "net.optimizer") for rank in (1, 2, 3, 4)]
        + ["checkpoint.json"]
    )
    built = job.make("ddp", 1)
    restore(path, built, ["net"])
    expected, found = torch.load(folder / "whole.pt"), job.whole(built)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    before = [p.detach().clone() for p in built.modules["net"].parameters()]
    built.modules["net"](torch.ones(1, 7)).sum().backward()
    built.optimizers["net"].step()
    assert built.optimizers["net"].state[built.modules["net"][0].weight]["step"].item() == 3.0
    assert not any(torch.equal(a, b) for a, b in zip(before, built.modules["net"].parameters(), strict=True))


@pytest.mark.parametrize("way", ["fsdp", "hsdp", "ddp"])
def test_every_value_is_written_once(folder, way):
    files = checkpoint_files(folder / way / "step_00000002")
    held = {part: read_shards(file)[0] for part, file in files.items()}
    sizes = {name: torch.Size(item.shape).numel() for name, item in held["net"].items()}
    assert sizes == {"0.weight": 35, "0.bias": 5, "2.weight": 15, "2.bias": 3}
    assert {name: item.bytes for name, item in held["net"].items()} == {name: 4 * size for name, size in sizes.items()}
    ranks = {piece.file for item in held["net.optimizer"].values() for piece in item.pieces}
    assert len(ranks) > 1, "the work is divided"


def test_weights_are_read_whole_from_any_of_the_files(folder):
    expected = torch.load(folder / "whole.pt")
    for number in (1, 3):
        source = open_weights(folder / "fsdp" / "step_00000002" / f"net-0000{number}-of-00004.safetensors")
        found = dict(source.tensors())
        assert source.format == "sftk"
        assert all(torch.allclose(found[name], expected[f"net/{name}"], rtol=0, atol=1e-6) for name in found)
        assert len(found) == 4


def test_what_is_missing_is_named(folder, tmp_path):
    for number in (1, 2, 4):
        name = f"net-0000{number}-of-00004.safetensors"
        (tmp_path / name).write_bytes((folder / "fsdp" / "step_00000002" / name).read_bytes())
    first = tmp_path / "net-00001-of-00004.safetensors"
    with pytest.raises(CheckpointError, match=r"is one of 4 files, and net-00003-of-00004.safetensors is not beside it"):
        open_weights(first)
    (tmp_path / "net-00003-of-00004.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"the pieces of 0.bias hold 6 values of 5"):
        open_weights(first)
    with pytest.raises(CheckpointError, match="name it as it was written"):
        open_weights(first.rename(tmp_path / "net.safetensors"))
