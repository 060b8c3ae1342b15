"""Safetensors files behind `torch.distributed.checkpoint`: each rank writes its parts of tensors, and reads any slice of them.

PyTorch plans who writes what, collects what every rank wrote, passes errors on to all of them and finds the slices that a rank
needs under another sharding. Here is only what is particular: files without pickled objects, one for each role and rank, which
hold a role's weights under their own names; a folder that appears as a whole, see `sftk.runtime.checkpoint.publish`.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from sftk.errors import CheckpointError
from sftk.models.shard_files import pieces_metadata, shard_name
from sftk.models.tensor_files import TORCH_DTYPES, Piece, Stored, not_whole

WRITERS = 4
"""Files that a rank writes at the same time, from copies."""


@attrs.frozen(kw_only=True, eq=False)
class Share:
    """What one rank writes of a tensor.

    Args:
        local: the values, on any device.
        offsets: where they begin in the tensor.
        shape: of the whole tensor.
    """

    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


SHARES = "shares"
"""The only key of what PyTorch is given to save: it logs every key, which takes long for thousands of tensors."""


class SharePlanner(DefaultSavePlanner):
    """Plans a checkpoint from `part/name` to `Share`: a tensor is written by the ranks that hold a share of it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """One item for each share of this rank."""
        shares: Mapping[str, Share] = self.state_dict[SHARES]
        self.plan = SavePlan([_write_item(key, share) for key, share in shares.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The values of an item."""
        return self.state_dict[SHARES][index.fqn].local


def _write_item(key: str, share: Share) -> WriteItem:
    offsets, sizes = torch.Size(share.offsets), share.local.shape
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
        properties=TensorProperties(dtype=share.local.dtype),
        size=torch.Size(share.shape),
    )
    return WriteItem(index=MetadataIndex(key, offsets), type=WriteItemType.SHARD, tensor_data=data)


class PartsWriter(StorageWriter):
    """Writes `<part>.safetensors`, or with several ranks a file of each, in a folder that `publish` then shows.

    Args:
        folder: to write into; made by whoever comes first.
        parts: their names, and what their files say about themselves.
        begin: called by the first rank before any writes.
        publish: called by the first rank when all have written.
        writers: files that a rank writes at the same time, and holds in the host's memory unless they are there already.
    """

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, Mapping[str, str]],
        begin: Callable[[], object],
        publish: Callable[[], object],
        writers: int = WRITERS,
    ):
        self._folder, self._parts, self._begin, self._publish, self._writers = folder, parts, begin, publish, writers

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is left from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells each rank which it is. Runs on the first one, before any writes."""
        self._begin()
        return [replace(plan, storage_data=(rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file of each part, and waits until they are on the disk."""
        rank, ranks = plan.storage_data
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        items: dict[str, list[WriteItem]] = {part: [] for part in self._parts}
        for item in plan.items:
            items[item.index.fqn.partition("/")[0]].append(item)
        with ThreadPoolExecutor(self._writers) as pool:
            list(pool.map(lambda part: self._write(part, items[part], planner, rank, ranks), items))
        sync(self._folder)
        written = [WriteResult(index=item.index, size_in_bytes=0, storage_data=None) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def _write(self, part: str, items: list[WriteItem], planner: SavePlanner, rank: int, ranks: int) -> None:
        tensors, places = {}, {}
        for item in items:
            assert item.tensor_data is not None
            name = item.index.fqn.partition("/")[2]
            assert name not in tensors, f"{item.index.fqn} has two shares on one rank"
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            tensors[name] = value.detach().cpu().contiguous()
            places[name] = (item.tensor_data.chunk.offsets, item.tensor_data.size)
        file = self._folder / shard_name(part, rank, ranks)
        about = {"format": "pt", **self._parts[part]}  # safetensors writes a broken header when there is nothing to say
        with writing(file, sum(tensor.nbytes for tensor in tensors.values())):
            save_file(tensors, file, metadata=about | (pieces_metadata(places) if ranks > 1 else {}))
            sync(file)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Shows the folder. Runs on the first rank, when all have written."""
        self._publish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class PartsReader(StorageReader):
    """Reads slices of what lies in files, from `part/name`.

    Args:
        stored: `part/name` to where it lies.
    """

    def __init__(self, stored: Mapping[str, Stored]):
        self._places: dict[MetadataIndex, tuple[Path, str]] = {}
        self._sizes: dict[str, TensorStorageMetadata] = {}
        for key, item in stored.items():
            pieces = item.pieces or (Piece(file=item.file, offsets=(0,) * len(item.shape), shape=item.shape),)
            chunks = []
            for piece in pieces:
                chunk = ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.shape))
                self._places[MetadataIndex(key, chunk.offsets)] = (piece.file, item.name)
                chunks.append(chunk)
            self._sizes[key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=TORCH_DTYPES[item.dtype]), size=torch.Size(item.shape), chunks=chunks
            )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is left from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes, and how the tensors are cut."""
        return Metadata(state_dict_metadata=dict(self._sizes), storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies slices into the tensors that wait for them, file by file."""
        files: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self._places[item.storage_index][0], []).append(item)
        for file, items in files.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for item in items:
                        self._copy(opened, item, planner)
            except (SafetensorError, OSError) as error:
                raise not_whole(file, error) from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _copy(self, opened: Any, item: ReadItem, planner: LoadPlanner) -> None:
        name = self._places[item.storage_index][1]
        ranges = tuple(slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True))
        value = opened.get_slice(name)[ranges] if ranges else opened.get_tensor(name)
        target = planner.resolve_tensor(item).detach()
        target.copy_(value)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


@contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Says of a file that cannot be written which it is, what happened and what to do.

    Args:
        path: of the file or folder. size: its bytes.

    Raises:
        CheckpointError: where an `OSError`, or safetensors' own error, was raised inside.

    Example:
        >>> with writing(Path("step/critic.safetensors"), 2**30):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        ...
        sftk.errors.CheckpointError: critic.safetensors (1.00 GiB): [Errno 28] No space left on device; make room, ... --resume
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        about = f"{path.name} ({size / 2**30:.2f} GiB)" if size else path.name
        advice = "see that the folder may be written to, and files of this size (rights, quota, ulimit -f)"
        if "No space left" in str(error):
            advice = "make room, or keep fewer checkpoints (checkpoint.keep)"
            if path.parent.is_dir():
                advice = f"{shutil.disk_usage(path.parent).free / 2**30:.2f} GiB are left there; {advice}"
        raise CheckpointError(f"{about}: {error}; {advice}, then go on with --resume") from error


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def quiet() -> None:
    """A single process needs no process group, and no warning that there is none."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def first_failure(error: BaseException) -> str:
    """The message of the first rank that failed."""
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0]) if failures else str(error)
