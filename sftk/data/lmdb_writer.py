"""Writes LMDB environments in the layout that `lmdb_layout` describes, a batch of records in a transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import torch
from torch import Tensor

from sftk.data.lmdb_layout import (
    ABOUT,
    LATENTS_SHAPE,
    PROMPTS_SHAPE,
    close_environment,
    latents_key,
    lmdb_reason,
    prompt_key,
    read_header,
)
from sftk.errors import DataError

_FIRST_MAP = 2**24


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


def open_for_writing(folder: Path) -> lmdb.Environment:
    """Opens an environment for writing; the folder is made when it is missing.

    Raises:
        DataError: what is there is no LMDB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    close_environment(folder)
    try:
        return lmdb.open(str(folder), map_size=_FIRST_MAP)
    except lmdb.Error as error:
        raise DataError(f"{folder} cannot be written as an LMDB: {lmdb_reason(error)}; remove it to begin afresh") from error


def put_values(environment: lmdb.Environment, values: Mapping[bytes, bytes]) -> None:
    """Writes values in one transaction. The map grows when it is full."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in values.items():
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


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
        >>> from sftk.data.lmdb_layout import read_record
        >>> folder = Path(tempfile.mkdtemp()) / "store"
        >>> with ShardWriter(folder, (2, 4, 8, 8)) as writer:
        ...     writer.append([torch.zeros(2, 4, 8, 8)], ["a 3 moving left"])
        >>> read_header(folder).count, read_record(read_header(folder), 0)[1]
        (1, 'a 3 moving left')
    """

    def __init__(self, folder: Path, shape: Sequence[int], *, sharded: bool = False, about: Mapping[str, Any] | None = None):
        self.folder, self.shape, self.sharded = Path(folder), tuple(shape), sharded
        self.environment = open_for_writing(self.folder)
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
            put_values(self.environment, {LATENTS_SHAPE: _sizes(0, self.shape), ABOUT: _json(about)} if about else {})
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
        put_values(self.environment, values)
        self.count = count

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
