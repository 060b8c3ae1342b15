"""Stores: what is written is read, in the order of the public reader; damage is named, or left out and listed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import lmdb
import pytest
import torch

from sftk.data.lmdb_layout import latents_key, prompt_key, read_about, read_header
from sftk.data.lmdb_store import LatentStore, check_latents, write_store
from sftk.data.lmdb_writer import ShardWriter
from sftk.errors import DataError


def records(count, frames=2, steps=None):
    axes = (frames, 4, 2, 2) if steps is None else (steps, frames, 4, 2, 2)
    return [(torch.full(axes, i + 0.5), f"prompt {i} é") for i in range(count)]


def change(folder, key, value):
    """Puts a value, or deletes the key for None."""
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        assert transaction.delete(key) if value is None else transaction.put(key, value)


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("shards", [None, 1, 3, 12])
def test_written_and_read(tmp_path, shards, steps):
    write_store(tmp_path / "s", records(14, steps=steps), shards=shards)
    store = LatentStore.open(tmp_path / "s")
    assert (len(store), store.shape) == (14, (steps or 1, 2, 4, 2, 2))
    found = [store[i] for i in range(14)]
    order = [i for shard in range(shards or 1) for i in range(shard, 14, shards or 1)]
    assert [prompt for _, prompt in found] == [f"prompt {i} é" for i in order]
    assert [latents.unique().tolist() for latents, _ in found] == [[i + 0.5] for i in order]
    assert all(latents.dtype == torch.float32 for latents, _ in found)


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for name, value in (("shard_2", 2.0), ("shard_10", 10.0), ("notes", None)):
        if value is None:
            (tmp_path / name).mkdir()
        else:
            write_store(tmp_path / name, [(torch.full((1, 1, 1, 1), value), name)])
    store = LatentStore.open(tmp_path)
    assert [store[i][1] for i in range(2)] == ["shard_10", "shard_2"]


def test_records_outside(tmp_path):
    write_store(tmp_path / "s", records(2))
    store = LatentStore.open(tmp_path / "s")
    for index in (-1, 2):
        with pytest.raises(IndexError):
            store[index]


def test_the_map_grows(tmp_path):
    big = torch.randn(4, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    with ShardWriter(tmp_path / "s", big.shape) as writer:
        for index in range(5):
            writer.append([big + index] * 8, ["x"] * 8)
    assert (tmp_path / "s" / "data.mdb").stat().st_size > 2**24
    store = LatentStore.open(tmp_path / "s")
    assert torch.equal(store[39][0][0], (big + 4).half().float())


def test_a_writer_goes_on_and_refuses_other_settings(tmp_path):
    for start in (0, 2):
        with ShardWriter(tmp_path / "s", (2, 4, 2, 2), about={"seed": 1}) as writer:
            assert writer.count == start
            writer.append([latents for latents, _ in records(2)], ["a", "b"])
    assert read_about(tmp_path / "s") == {"seed": 1}
    with pytest.raises(DataError, match=r"made with other settings: seed was 1, is now 2; take another folder"):
        ShardWriter(tmp_path / "s", (2, 4, 2, 2), about={"seed": 2})
    with pytest.raises(DataError, match=r"holds records of \[2, 4, 2, 2\], expected \[3, 4, 2, 2\]"):
        ShardWriter(tmp_path / "s", (3, 4, 2, 2), about={"seed": 1})
    with pytest.raises(DataError, match="holds a store already"):
        write_store(tmp_path / "s", records(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_float16_cannot_hold(tmp_path, value):
    with pytest.raises(DataError, match="the latents of 'x' are not finite in float16"):
        write_store(tmp_path / "s", [(torch.full((1, 1, 1, 1), value), "x")])


def test_a_batch_is_there_as_a_whole_or_not_at_all(tmp_path):
    good, bad = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), float("nan"))
    with ShardWriter(tmp_path / "s", (1, 1, 1, 1)) as writer:
        writer.append([good], ["x"])
        with pytest.raises(DataError):
            writer.append([good, bad], ["y", "z"])
        assert writer.count == 1
    assert len(LatentStore.open(tmp_path / "s")) == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9999])
def test_a_truncated_file_is_an_error_and_not_a_crash(tmp_path, share):
    write_store(tmp_path / "s", records(40), shards=2)
    file = tmp_path / "s" / "shard_1" / "data.mdb"
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(DataError, match=rf"{file}.* truncated"):
        LatentStore.open(tmp_path / "s")
    store = LatentStore.open(tmp_path / "s", skip_bad=True)
    assert (len(store), len(store.bad)) == (20, 1)
    assert str(file) in store.bad[0]


def test_a_foreign_file(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"not an LMDB file" * 4096)
    with pytest.raises(DataError, match=r"data.mdb is no LMDB: File is not an LMDB file"):
        LatentStore.open(tmp_path)


def test_an_lmdb_of_another_layout(tmp_path):
    lmdb.open(str(tmp_path / "s")).close()
    with pytest.raises(DataError, match=r"another layout: it has no key 'latents_shape'; expected latents_<i>_data"):
        LatentStore.open(tmp_path / "s")
    for text in (b"3", b"2 a b", b"1 0 2 3 4"):
        change(tmp_path / "s", b"latents_shape", text)
        with pytest.raises(DataError, match=rf"latents_shape is b?'{text.decode()}'; expected"):
            LatentStore.open(tmp_path / "s")


def test_paths_that_are_no_store(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "no such store"), ("file", "is a file"), ("empty", "neither it nor a folder in it")):
        with pytest.raises(DataError, match=message):
            LatentStore.open(tmp_path / name)


def test_shards_of_different_shapes(tmp_path):
    write_store(tmp_path / "s" / "a", records(2))
    write_store(tmp_path / "s" / "b", records(3, frames=3))
    with pytest.raises(DataError, match=r"s/b holds records of \[3, 4, 2, 2\], but .*s/a of \[2, 4, 2, 2\]"):
        LatentStore.open(tmp_path / "s")
    store = LatentStore.open(tmp_path / "s", skip_bad=True)
    assert (len(store), store.shape[1]) == (2, 2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (latents_key(1), None, "record 1: the key latents_1_data is missing, though latents_shape speaks of 4 records"),
        (prompt_key(1), None, "record 1: the key prompts_1_data is missing"),
        (latents_key(1), b"abc", r"record 1: the latents have 3 bytes, expected 64 for float16 \[2, 4, 2, 2\]"),
        (prompt_key(1), b"\xff", "record 1: the prompt is not UTF-8"),
    ],
)
def test_damaged_records(tmp_path, key, value, message):
    write_store(tmp_path / "s", records(4))
    change(tmp_path / "s", key, value)
    store = LatentStore.open(tmp_path / "s")
    assert store[2][1] == "prompt 2 é"
    with pytest.raises(DataError, match=message):
        store[1]
    store = LatentStore.open(tmp_path / "s", skip_bad=True)
    assert [store[i][1][:8] for i in range(len(store))] == ["prompt 0", "prompt 2", "prompt 3"]
    assert len(store.bad) == 1


def test_nothing_left(tmp_path):
    write_store(tmp_path / "s", records(1))
    change(tmp_path / "s", latents_key(0), None)
    with pytest.raises(DataError, match=r"holds no usable record:\n.*record 0"):
        LatentStore.open(tmp_path / "s", skip_bad=True)


def test_latents_of_another_size(tmp_path):
    write_store(tmp_path / "s", records(1))
    store = LatentStore.open(tmp_path / "s")
    check_latents(store, (2, 4, 2, 2))
    with pytest.raises(DataError, match=r"set latents: {frames: 2, channels: 4, height: 2, width: 2}"):
        check_latents(store, (21, 4, 2, 2))


def test_a_read_only_folder(tmp_path):
    write_store(tmp_path / "s", records(2))
    (tmp_path / "s" / "lock.mdb").unlink()
    os.chmod(tmp_path / "s", 0o555)
    try:
        assert LatentStore.open(tmp_path / "s")[1][1] == "prompt 1 é"
        assert not (tmp_path / "s" / "lock.mdb").exists()
    finally:
        os.chmod(tmp_path / "s", 0o755)


def test_a_fork_opens_its_own_environment(tmp_path):
    write_store(tmp_path / "s", records(3))
    store = LatentStore.open(tmp_path / "s")
    assert store[0][1] == "prompt 0 é"
    child = os.fork()
    if child == 0:
        os._exit(0 if store[1][1] == "prompt 1 é" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store[2][1] == "prompt 2 é"


KILLED = """\
import os, sys, torch
from pathlib import Path
from sftk.data.lmdb_writer import ShardWriter
with ShardWriter(Path(sys.argv[1]), (1, 1, 1, 1)) as writer:
    while True:
        writer.append([torch.full((1, 1, 1, 1), float(writer.count))], ["x"])
        print(writer.count, flush=True)
"""


def test_a_killed_writer_leaves_whole_records(tmp_path):
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            seen = [int(process.stdout.readline()) for _ in range(7)]
        finally:
            process.kill()
            process.communicate()
        assert read_header(tmp_path / "s").count >= seen[-1]
    store = LatentStore.open(tmp_path / "s")
    assert [store[i][0].item() for i in range(len(store))] == [float(i) for i in range(len(store))]


def test_a_copy_of_a_store_is_a_store(tmp_path):
    write_store(tmp_path / "s", records(5), shards=2)
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    assert len(LatentStore.open(tmp_path / "t")) == 5
