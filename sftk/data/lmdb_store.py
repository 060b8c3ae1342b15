"""A store of latents and prompts: one LMDB environment, or a folder of shards that are read one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import attrs
from torch import Tensor

from sftk.data.latent_sizes import check_size
from sftk.data.lmdb_layout import Header, is_environment, open_for_reading, read_header, read_record, record_problem
from sftk.data.lmdb_writer import ShardWriter
from sftk.errors import DataError

Place = tuple[int, int]
"""A shard and a record in it."""


@attrs.frozen(eq=False)
class LatentStore:
    """Records of one or several LMDB environments, in the order of the shards' names.

    Nothing stays open until a record is read, and every process opens its own environments, so that workers survive a fork.

    Args:
        path: the store.
        shards: what each environment says of itself.
        places: where each record lies, when some were left out; None when all are there.
        bad: what was left out, and why.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "store"
        >>> write_store(path, [(torch.zeros(2, 4, 8, 8), f"a {i} moving up") for i in range(3)], shards=2)
        >>> store = LatentStore.open(path)
        >>> len(store), store.shape, [store[i][1] for i in range(3)]
        (3, (1, 2, 4, 8, 8), ['a 0 moving up', 'a 2 moving up', 'a 1 moving up'])
    """

    path: Path
    shards: tuple[Header, ...]
    places: tuple[Place, ...] | None = None
    bad: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | Path, *, skip_bad: bool = False) -> LatentStore:
        """Opens a store and checks its shards.

        Args:
            path: a folder with a data.mdb, or a folder of such folders.
            skip_bad: leave out shards and records that cannot be used, and list them in `bad`. Looks at every key once.

        Raises:
            DataError: there is no store, a shard is truncated, foreign or of another shape, or no record is left.
        """
        found = cls.glance(path, skip_bad=skip_bad)
        bad = list(found.bad)
        places = _good_places(found.shards, bad) if skip_bad else None
        store = attrs.evolve(found, places=places, bad=tuple(bad))
        if len(store) == 0:
            reasons = "".join(f"\n  {reason}" for reason in bad)
            raise DataError(f"{path} holds no usable record{':' if bad else ''}{reasons}")
        return store

    @classmethod
    def glance(cls, path: str | Path, *, skip_bad: bool = False) -> LatentStore:
        """What a store's shards say of themselves; no record is looked at, and there may be none.

        Args:
            path: see `open`.
            skip_bad: leave out shards that cannot be used, and list them in `bad`.

        Raises:
            DataError: there is no store, or a shard is truncated, foreign or of another shape.
        """
        path = Path(path)
        headers: list[Header] = []
        bad: list[str] = []
        for folder in shard_folders(path):
            try:
                header = read_header(folder)
                first = headers[0] if headers else header
                if header.shape != first.shape:
                    raise DataError(
                        f"{header.folder} holds records of {list(header.shape)}, but {first.folder} of {list(first.shape)}; "
                        "the shards of a store have one shape"
                    )
            except DataError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
                continue
            headers.append(header)
        return cls(path=path, shards=tuple(headers), bad=tuple(bad))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Axes of a record: S, F, C, H, W."""
        axes = self.shards[0].shape
        steps, frames, channels, height, width = axes if len(axes) == 5 else (1, *axes)
        return steps, frames, channels, height, width

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards) if self.places is None else len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Latents [S, F, C, H, W] float32, and the prompt.

        Raises:
            IndexError: no such record.
            DataError: it is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        shard, record = self._place(index) if self.places is None else self.places[index]
        return read_record(self.shards[shard], record)

    def _place(self, index: int) -> Place:
        ends = list(accumulate(shard.count for shard in self.shards))
        shard = bisect_right(ends, index)
        return shard, index - (ends[shard - 1] if shard else 0)


def shard_folders(path: Path) -> list[Path]:
    """The environments of a store, sorted by name as the public reader sorts them.

    Raises:
        DataError: the path is no store.
    """
    if not path.exists():
        raise DataError(f"no such store {path}; expected a folder with a data.mdb, or a folder of such folders")
    if not path.is_dir():
        raise DataError(f"{path} is a file; expected the folder that holds data.mdb, or a folder of such folders")
    if is_environment(path):
        return [path]
    found = sorted((folder for folder in path.iterdir() if is_environment(folder)), key=lambda folder: folder.name)
    if not found:
        raise DataError(f"{path} holds no LMDB: neither it nor a folder in it has a data.mdb")
    return found


def write_store(path: str | Path, records: Iterable[tuple[Tensor, str]], *, shards: int | None = None) -> None:
    """Writes records as a store in the public layout.

    Args:
        path: a folder; it is made, and must not hold a store yet.
        records: latents [F, C, H, W] or [S, F, C, H, W], and their prompt.
        shards: None for one environment; a number for so many, with record i in shard i modulo that number.

    Raises:
        DataError: there is a store, or shapes differ.
    """
    path = Path(path)
    if path.exists() and any(path.rglob("data.mdb")):
        raise DataError(f"{path} holds a store already; take another folder")
    writers: list[ShardWriter] = []
    digits = len(str((shards or 1) - 1))
    try:
        for index, (latents, prompt) in enumerate(records):
            if index < (shards or 1):
                folder = path if shards is None else path / f"shard_{index:0{digits}d}"
                writers.append(ShardWriter(folder, tuple(latents.shape), sharded=shards is not None))
            writers[index % (shards or 1)].append([latents], [prompt])
    finally:
        for writer in writers:
            writer.close()


def check_latents(store: LatentStore, wanted: Sequence[int]) -> None:
    """Checks a store's latents against a recipe's.

    Args:
        wanted: F, C, H, W.

    Raises:
        DataError: they differ.
    """
    check_size(f"{store.path} holds", store.shape[1:], wanted, "name a store of that size")


def _good_places(headers: Sequence[Header], bad: list[str]) -> tuple[Place, ...]:
    places = []
    for number, header in enumerate(headers):
        with open_for_reading(header.folder) as environment, environment.begin(buffers=True) as transaction:
            for record in range(header.count):
                problem = record_problem(transaction, header, record)
                if problem is None:
                    places.append((number, record))
                else:
                    bad.append(problem)
    return tuple(places)
