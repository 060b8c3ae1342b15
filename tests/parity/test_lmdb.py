"""The LMDB layout: the public stores are read, and ours have the same keys and bytes."""

import json
import tempfile
from pathlib import Path

import torch
from parity_cases import FOLDER, Case

from sftk.data.lmdb_layout import open_for_reading
from sftk.data.lmdb_store import LatentStore, shard_folders, write_store


def test_lmdb(case: Case):
    written = Path(tempfile.mkdtemp())
    prompts = json.loads((FOLDER / f"{case.name}_prompts.json").read_text(encoding="utf-8"))
    for key in case:
        name = key.removesuffix(".ode_latent")
        store = LatentStore.open(FOLDER / "lmdb" / name)
        records = [store[i] for i in range(len(store))]
        assert len(records) == case.meta[f"len_{name}"]
        case.check(key, torch.stack([latents for latents, _ in records]), tolerance=0.0)
        assert [prompt for _, prompt in records] == prompts[f"prompts_{name}"]
        shards = None if store.shards[0].folder == store.path else len(store.shards)
        order = range(len(records)) if shards is None else sorted(range(len(records)), key=lambda i: place(store, i))
        steps = len(store.shards[0].shape) == 5
        write_store(
            written / name, [(records[i][0] if steps else records[i][0][0], records[i][1]) for i in order], shards=shards
        )
        assert contents(written / name) == contents(store.path)


def place(store: LatentStore, index: int) -> tuple[int, int]:
    """Row and shard of a record: the public script deals records out to the shards in turn."""
    shard = 0
    while index >= store.shards[shard].count:
        index -= store.shards[shard].count
        shard += 1
    return index, shard


def contents(path: Path) -> list[dict[bytes, bytes]]:
    """Keys and values of each environment."""
    found = []
    for folder in shard_folders(path):
        with open_for_reading(folder) as environment, environment.begin() as transaction:
            found.append({bytes(key): bytes(value) for key, value in transaction.cursor()})
    return found
