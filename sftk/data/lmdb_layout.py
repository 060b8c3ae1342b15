"""One LMDB environment in the layout of Self-Forcing and CausVid; `lmdb_writer` writes it.

`latents_<i>_data` holds float16 bytes in C order, `prompts_<i>_data` UTF-8; `latents_shape` and `prompts_shape` hold sizes as
decimal text, the number of records first. In a shard of several, the public code writes the latents' sizes to both.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import attrs
import lmdb
import numpy as np
import torch
from torch import Tensor

from sftk.errors import DataError

LATENTS_SHAPE, PROMPTS_SHAPE, ABOUT = b"latents_shape", b"prompts_shape", b"sftk_about"

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
    close_environment(folder)
    if not file.is_file():
        raise DataError(f"{folder} holds no LMDB: there is no data.mdb in it")
    try:
        environment = lmdb.open(str(folder), readonly=True, create=False, lock=lock, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{file} is no LMDB: {lmdb_reason(error)}; it is truncated, or another program's file") from error
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
        text = get_value(transaction, LATENTS_SHAPE, folder)
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
        text = get_value(transaction, ABOUT, folder)
    return {} if text is None else json.loads(text)


def read_record(header: Header, index: int) -> tuple[Tensor, str]:
    """One record: latents [S, F, C, H, W] float32 (S is 1 where the layout has none) and the prompt.

    The environment is opened once a process and stays open.

    Raises:
        DataError: the record is missing or has another size.
    """
    with open_environment(header.folder).begin(buffers=True) as transaction:
        problem = record_problem(transaction, header, index)
        if problem is not None:
            raise DataError(problem)
        data, text = transaction.get(latents_key(index)), transaction.get(prompt_key(index))
        assert data is not None and text is not None
        latents = np.frombuffer(data, dtype="<f2").astype(np.float32)
        prompt = bytes(text).decode()
    shape = header.shape if len(header.shape) == 5 else (1, *header.shape)
    return torch.from_numpy(latents).reshape(shape), prompt


def open_environment(folder: Path) -> lmdb.Environment:
    """The environment of a folder, opened for reading once a process; it stays open.

    Raises:
        DataError: it is missing, truncated or no LMDB.
    """
    place = folder.resolve()
    if place not in _OPEN:
        _OPEN[place] = open_for_reading(place)
    return _OPEN[place]


def close_environments() -> None:
    """Closes what this process holds open for reading."""
    while _OPEN:
        _OPEN.popitem()[1].close()


def close_environment(folder: Path) -> None:
    """Closes an environment, if this process reads from it."""
    opened = _OPEN.pop(folder.resolve(), None)
    if opened is not None:
        opened.close()


# An environment must not be used in a child of the process that opened it.
os.register_at_fork(after_in_child=close_environments)


def record_problem(transaction: Any, header: Header, index: int) -> str | None:
    """What is wrong with a record, without reading its latents; None for a good one."""
    latents, prompt = (get_value(transaction, key, header.folder) for key in (latents_key(index), prompt_key(index)))
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


def get_value(transaction: Any, key: bytes, folder: Path) -> Any:
    """The value of a key, or None.

    Raises:
        DataError: the file is damaged there.
    """
    try:
        return transaction.get(key)
    except lmdb.Error as error:
        raise DataError(
            f"{folder}: the key {key.decode()!r} cannot be read: {lmdb_reason(error)}; the file is damaged"
        ) from error


def lmdb_reason(error: Exception) -> str:
    """What LMDB says went wrong, without the path.

    Example:
        >>> lmdb_reason(lmdb.InvalidError("data.mdb: File is not an LMDB file"))
        'File is not an LMDB file'
    """
    return str(error).rpartition(": ")[2]
