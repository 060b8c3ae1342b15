"""One LMDB environment in the layout of Self-Forcing and CausVid, read and written.

`latents_<i>_data` holds float16 bytes in C order, `prompts_<i>_data` UTF-8; `latents_shape` and `prompts_shape` hold sizes as
decimal text, the number of records first. In a shard of several, the public code writes the latents' sizes to both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import lmdb
import numpy as np
import torch
from torch import Tensor

from sftk.errors import DataError

LATENTS_SHAPE, PROMPTS_SHAPE, ABOUT = b"latents_shape", b"prompts_shape", b"sftk_about"
_FIRST_MAP = 2**24

_OPEN: dict[Path, lmdb.Environment] = {}
"""Environments from which this process reads records. LMDB allows one handle for each file in a process."""


@attrs.frozen
class Header:
    """What an environment says of itself.

    Args:
        folder: where it lies.
        count: how many records it has.
        shape: axes of one record: [F, C, H, W] or [S, F, C, H, W].
    """

    folder: Path
    count: int
    shape: tuple[int, ...]


def latents_key(index: int) -> bytes:
    """Key of a record's latents.

    Example:
        >>> latents_key(3)
        b'latents_3_data'
    """
    return f"latents_{index}_data".encode()


def prompt_key(index: int) -> bytes:
    """Key of a record's prompt."""
    return f"prompts_{index}_data".encode()


def is_environment(folder: Path) -> bool:
    """Whether a folder holds an LMDB environment's file."""
    return (folder / "data.mdb").is_file()


def open_for_reading(folder: Path, *, lock: bool = False) -> lmdb.Environment:
    """Opens an environment for reading. Without a lock nothing is written, so that the folder may be read-only.

    Args:
        lock: register as a reader; needed while another process may write.

    Raises:
        DataError: it is missing, truncated or no LMDB.
    """
    file = folder / "data.mdb"
    _close(folder)
    if not file.is_file():
        raise DataError(f"{folder} holds no LMDB: there is no data.mdb in it")
    try:
        environment = lmdb.open(str(folder), readonly=True, create=False, lock=lock, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{file} is no LMDB: {_reason(error)}; it is truncated, or another program's file") from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.stat().st_size < needed:
        environment.close()
        found = file.stat().st_size
        raise DataError(f"{file} is truncated: it has {found} bytes, its header speaks of {needed}; copy or make it again")
    return environment


def read_header(folder: Path, environment: lmdb.Environment | None = None) -> Header:
    """Number and shape of an environment's records.

    Raises:
        DataError: it is missing, truncated, no LMDB, or of another layout.
    """
    if environment is None:
        with open_for_reading(folder) as opened:
            return read_header(folder, opened)
    with environment.begin() as transaction:
        text = _get(transaction, LATENTS_SHAPE, folder)
    if text is None:
        raise DataError(
            f"{folder} is an LMDB of another layout: it has no key 'latents_shape'; "
            "expected latents_<i>_data, prompts_<i>_data and latents_shape"
        )
    try:
        count, *shape = (int(part) for part in text.decode().split())
    except ValueError as error:
        raise DataError(f"{folder}: latents_shape is {text[:80]!r}; expected sizes such as '3 5 21 16 60 104'") from error
    if len(shape) not in (4, 5) or count < 0 or min(shape) < 1:
        found = text.decode()
        raise DataError(f"{folder}: latents_shape is {found!r}; expected a count and [F, C, H, W] or [S, F, C, H, W]")
    return Header(folder=folder, count=count, shape=tuple(shape))


def read_about(folder: Path) -> dict[str, Any]:
    """What sftk wrote about how the records were made; empty for environments of others."""
    with open_for_reading(folder) as environment, environment.begin() as transaction:
        text = _get(transaction, ABOUT, folder)
    return {} if text is None else json.loads(text)


def read_record(header: Header, index: int) -> tuple[Tensor, str]:
    """One record: latents [S, F, C, H, W] float32 (S is 1 where the layout has none) and the prompt.

    The environment is opened once a process and stays open.

    Raises:
        DataError: the record is missing or has another size.
    """
    place = header.folder.resolve()
    if place not in _OPEN:
        _OPEN[place] = open_for_reading(place)
    with _OPEN[place].begin(buffers=True) as transaction:
        problem = record_problem(transaction, header, index)
        if problem is not None:
            raise DataError(problem)
        data, text = transaction.get(latents_key(index)), transaction.get(prompt_key(index))
        assert data is not None and text is not None
        latents = np.frombuffer(data, dtype="<f2").astype(np.float32)
        prompt = bytes(text).decode()
    shape = header.shape if len(header.shape) == 5 else (1, *header.shape)
    return torch.from_numpy(latents).reshape(shape), prompt


def close_environments() -> None:
    """Closes what this process holds open for reading."""
    while _OPEN:
        _OPEN.popitem()[1].close()


def _close(folder: Path) -> None:
    opened = _OPEN.pop(folder.resolve(), None)
    if opened is not None:
        opened.close()


# An environment must not be used in a child of the process that opened it.
os.register_at_fork(after_in_child=close_environments)


def record_problem(transaction: Any, header: Header, index: int) -> str | None:
    """What is wrong with a record, without reading its latents; None for a good one."""
    latents, prompt = (_get(transaction, key, header.folder) for key in (latents_key(index), prompt_key(index)))
    where = f"{header.folder}, record {index}"
    for name, value in (("latents", latents), ("prompts", prompt)):
        if value is None:
            return f"{where}: the key {name}_{index}_data is missing, though latents_shape speaks of {header.count} records"
    expected = 2 * int(np.prod(header.shape))
    if len(latents) != expected:
        return f"{where}: the latents have {len(latents)} bytes, expected {expected} for float16 {list(header.shape)}"
    try:
        bytes(prompt).decode()
    except UnicodeDecodeError as error:
        return f"{where}: the prompt is not UTF-8: {error}"
    return None


def check_about(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Checks what an environment says about how its records were made; nothing wanted or nothing found passes.

    Raises:
        DataError: they differ.
    """
    wanted = json.loads(_json(wanted))
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if found and wanted and differing:
        shown = "; ".join(f"{key} was {found.get(key)!r}, is now {wanted.get(key)!r}" for key in differing)
        raise DataError(f"{folder} was made with other settings: {shown}; take another folder, or remove this one")


class ShardWriter:
    """Appends records to one environment. A batch is one transaction: after a crash all of it is there, or nothing.

    Args:
        folder: of the environment; made when it is missing.
        shape: axes of one record, [F, C, H, W] or [S, F, C, H, W].
        sharded: write `prompts_shape` as the public code does in shards.
        about: how the records are made; an environment that says otherwise is refused.

    Raises:
        DataError: the folder holds records of another shape or made otherwise.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "store"
        >>> with ShardWriter(folder, (2, 4, 8, 8)) as writer:
        ...     writer.append([torch.zeros(2, 4, 8, 8)], ["a 3 moving left"])
        >>> read_header(folder).count, read_record(read_header(folder), 0)[1]
        (1, 'a 3 moving left')
    """

    def __init__(self, folder: Path, shape: Sequence[int], *, sharded: bool = False, about: Mapping[str, Any] | None = None):
        self.folder, self.shape, self.sharded = Path(folder), tuple(shape), sharded
        self.folder.mkdir(parents=True, exist_ok=True)
        _close(self.folder)
        try:
            self.environment = lmdb.open(str(self.folder), map_size=_FIRST_MAP)
        except lmdb.Error as error:
            raise DataError(
                f"{self.folder} cannot be written as an LMDB: {_reason(error)}; remove it to begin afresh"
            ) from error
        try:
            self.count = self._begin(dict(about or {}))
        except BaseException:
            self.environment.close()
            raise

    def _begin(self, about: dict[str, Any]) -> int:
        with self.environment.begin() as transaction:
            text = transaction.get(ABOUT)
            fresh = transaction.get(LATENTS_SHAPE) is None and transaction.stat()["entries"] == 0
        header = None if fresh else read_header(self.folder, self.environment)
        if header is None or header.count == 0:
            self._put({LATENTS_SHAPE: _sizes(0, self.shape), ABOUT: _json(about)} if about else {})
            return 0
        if header.shape != self.shape:
            raise DataError(f"{self.folder} holds records of {list(header.shape)}, expected {list(self.shape)}")
        found = {} if text is None else json.loads(text)
        check_about(self.folder, found, about)
        return header.count

    def append(self, latents: Sequence[Tensor], prompts: Sequence[str], extra: Mapping[bytes, bytes] | None = None) -> None:
        """Adds records at the end, all in one transaction.

        Args:
            latents: each of the writer's shape; stored as float16.
            prompts: one for each.
            extra: further keys of the same transaction.

        Raises:
            DataError: a shape differs, or a value is not finite in float16.
        """
        values = dict(extra or {})
        for offset, (tensor, prompt) in enumerate(zip(latents, prompts, strict=True)):
            if tuple(tensor.shape) != self.shape:
                raise DataError(f"{self.folder}: a record of {list(tensor.shape)}, expected {list(self.shape)}")
            half = tensor.detach().to("cpu", torch.float16).contiguous()
            if not half.isfinite().all():
                raise DataError(f"{self.folder}: the latents of {prompt!r} are not finite in float16")
            values[latents_key(self.count + offset)] = half.numpy().astype("<f2", copy=False).tobytes()
            values[prompt_key(self.count + offset)] = prompt.encode()
        count = self.count + len(prompts)
        values[LATENTS_SHAPE] = _sizes(count, self.shape)
        values[PROMPTS_SHAPE] = values[LATENTS_SHAPE] if self.sharded else _sizes(count, ())
        self._put(values)
        self.count = count

    def _put(self, values: Mapping[bytes, bytes]) -> None:
        while True:
            try:
                with self.environment.begin(write=True) as transaction:
                    for key, value in values.items():
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self.environment.set_mapsize(2 * self.environment.info()["map_size"])

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        with self.environment.begin() as transaction:
            return transaction.get(key)

    def close(self) -> None:
        """Closes the environment."""
        self.environment.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sizes(count: int, shape: Sequence[int]) -> bytes:
    return " ".join(map(str, (count, *shape))).encode()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def _get(transaction: Any, key: bytes, folder: Path) -> Any:
    try:
        return transaction.get(key)
    except lmdb.Error as error:
        raise DataError(f"{folder}: the key {key.decode()!r} cannot be read: {_reason(error)}; the file is damaged") from error


def _reason(error: Exception) -> str:
    return str(error).rpartition(": ")[2]
