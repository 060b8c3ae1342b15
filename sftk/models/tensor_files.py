"""Tensors in safetensors and PyTorch files: their names and shapes first, their values one by one, memory-mapped."""

from __future__ import annotations

import functools
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sftk.errors import CheckpointError, did_you_mean

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that `torch.save` wrote."""

ENTRIES = ("generator_ema", "generator")
"""What is taken from a training checkpoint when its user names no entry: the average first."""

MAPPED_AT_ONCE = 1 << 30
"""Bytes of tensors that are read before a file is mapped anew, which lets go of the pages read so far."""

_ZIP = b"PK\x03\x04"
_POINTER = b"version https://git-lfs."
_POINTED = "a Git LFS pointer and not the file itself; fetch it with `git lfs pull`, or download it with `hf download`"
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes as safetensors writes them."""


@attrs.frozen(kw_only=True)
class Piece:
    """A part of a tensor, in a file of one rank.

    Args:
        file: it lies in, under the tensor's name.
        offsets: where it begins in the tensor.
        shape: its sizes.
    """

    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@attrs.frozen(kw_only=True)
class Stored:
    """A tensor in a file.

    Args:
        file: it lies in, or the first file when it lies in pieces.
        name: it has there.
        shape: its sizes.
        bytes: it takes.
        dtype: as safetensors writes it, such as BF16; empty in a PyTorch file.
        entry: of the dictionary in a PyTorch file that it lies in, or None.
        pieces: that make it up; none when it lies in `file` as a whole.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    bytes: int
    dtype: str = ""
    entry: str | None = None
    pieces: tuple[Piece, ...] = ()


def split_entry(path: str | Path) -> tuple[Path, str | None]:
    """A PyTorch file and the entry that is named after a colon.

    Example:
        >>> file, entry = split_entry("self_forcing_dmd.pt:generator_ema")
        >>> str(file), entry
        ('self_forcing_dmd.pt', 'generator_ema')
    """
    file, colon, entry = str(path).rpartition(":")
    if colon and Path(file).suffix in PICKLES:
        return Path(file), entry
    return Path(path), None


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """What lies in a safetensors file, in the file's order, and its metadata.

    Raises:
        CheckpointError: it is missing or broken.
    """
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}; expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.offset_keys():
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                size = torch.Size(shape).numel() * _itemsize(part.get_dtype())
                found[name] = Stored(file=path, name=name, shape=shape, bytes=size, dtype=part.get_dtype())
            return found, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise not_whole(path, error) from error


def _itemsize(dtype: str) -> int:
    return TORCH_DTYPES[dtype].itemsize if dtype in TORCH_DTYPES else 1


def not_whole(path: Path, error: Exception) -> CheckpointError:
    """What is said of a safetensors file that cannot be read, with the sizes when it is truncated."""
    return CheckpointError(f"{path} is not a whole safetensors file: {_what_is_wrong(path, error)}")


def read_pickle(path: Path, entry: str | None) -> dict[str, Stored]:
    """What lies in a PyTorch file: a dictionary of tensors, or one entry of a dictionary of such dictionaries.

    Args:
        entry: which one; None takes the first of `ENTRIES` that is there, or the only one.

    Raises:
        CheckpointError: it is missing or broken, holds more than tensors, or no such entry; the message lists what is there.
    """
    tensors, entry = _choose(path, _load(path), entry)
    return {
        name: Stored(file=path, name=name, shape=tuple(t.shape), bytes=t.numel() * t.element_size(), entry=entry)
        for name, t in tensors.items()
    }


def stream(
    stored: Iterable[Stored], rows: Callable[[Stored], slice | None] = lambda item: None
) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors' values, in the given order; each is valid until the next one is asked for.

    Memory-mapped: the process holds at most about `MAPPED_AT_ONCE` bytes of a file, and a tensor itself.

    Args:
        rows: which rows of a tensor are wanted, and read; None is all of them.

    Raises:
        CheckpointError: a file is broken.
    """
    for group in _groups(stored):
        with _opened(group[0]) as get:
            for item in group:
                part = rows(item)
                if part is None or part.start < part.stop:
                    yield item, get(item, part)


def _groups(stored: Iterable[Stored]) -> Iterator[list[Stored]]:
    group: list[Stored] = []
    size = 0
    for item in stored:
        if group and (item.file != group[0].file or item.entry != group[0].entry or size + item.bytes > MAPPED_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(item)
        size += item.bytes
    if group:
        yield group


@contextmanager
def _opened(item: Stored) -> Iterator[Callable[[Stored, slice | None], Tensor]]:
    if item.file.suffix in PICKLES:
        tensors, _ = _choose(item.file, _load(item.file), item.entry)
        yield lambda wanted, rows: tensors[wanted.name] if rows is None else tensors[wanted.name][rows]
        return
    if item.pieces:
        with ExitStack() as files:
            opened = functools.cache(lambda path: files.enter_context(_safe_open(path)))
            yield lambda wanted, rows: _put_together(wanted, rows, opened)
        return
    with _safe_open(item.file) as file:
        yield lambda wanted, rows: file.get_tensor(wanted.name) if rows is None else file.get_slice(wanted.name)[rows]


def _put_together(item: Stored, rows: slice | None, opened: Callable[[Path], Any]) -> Tensor:
    """The wanted rows, from the pieces that have some of them."""
    if not item.shape:
        return opened(item.pieces[0].file).get_tensor(item.name)
    first, last = (rows.start, rows.stop) if rows is not None else (0, item.shape[0])
    found = torch.empty((last - first, *item.shape[1:]), dtype=TORCH_DTYPES[item.dtype])
    for piece in item.pieces:
        start = piece.offsets[0]
        here = slice(max(first, start), min(last, start + piece.shape[0]))
        if here.start < here.stop:
            columns = (slice(at, at + size) for at, size in zip(piece.offsets[1:], piece.shape[1:], strict=True))
            part = opened(piece.file).get_slice(item.name)[here.start - start : here.stop - start]
            found[(slice(here.start - first, here.stop - first), *columns)] = part
    return found


@contextmanager
def _safe_open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise not_whole(path, error) from error


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}; expected a file that torch.save wrote")
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise CheckpointError(f"{path} is {_POINTED}")
    mapped = start[:4] == _ZIP  # PyTorch before 1.6 wrote files that cannot be mapped
    if mapped and not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise CheckpointError(f"{path} is not a whole PyTorch file: it is truncated after {size} bytes; copy it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is no PyTorch file; expected dictionaries of tensors. {_saved_anew(path)}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if tarfile.is_tarfile(path):
            raise CheckpointError(f"{path} is a .tar of an old PyTorch, which can hold code. {_saved_anew(path)}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = path.stat().st_size
        raise CheckpointError(f"{path} is not a whole PyTorch file ({size} bytes): {reason}; copy it again") from error


def _saved_anew(path: Path) -> str:
    """How a file that PyTorch reads only by running it becomes one of tensors."""
    new = path.with_name(f"{path.stem}_tensors{path.suffix}")
    script = f"import torch; m = torch.load('{path}', 'cpu', weights_only=False)"
    save = f"torch.save(m.state_dict() if hasattr(m, 'state_dict') else m, '{new}')"
    return f'If you trust where it comes from, save its tensors anew: python -c "{script}; {save}"'


def _choose(path: Path, value: Any, entry: str | None) -> tuple[dict[str, Tensor], str | None]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a dictionary of tensors")
    entries = [str(key) for key, part in value.items() if _is_state(part)]
    if entry is None and _is_state(value):
        return dict(value), None
    if entry is None:
        entry = next((name for name in ENTRIES if name in entries), entries[0] if len(entries) == 1 else None)
    if entry is None:
        others = [str(key) for key, part in value.items() if not isinstance(part, Tensor)]
        if len(others) < len(value) and not entries:
            raise CheckpointError(f"{path} holds {', '.join(others[:8])} besides tensors; expected tensors alone")
        there = f"the entries {', '.join(entries)}" if entries else f"only {', '.join(others[:8]) or 'nothing'}"
        raise CheckpointError(f"{path} holds {there}; expected tensors, or name the entry: {path.name}:<entry>")
    if entry not in entries:
        there = f"the entries {', '.join(entries)}" if entries else "a plain dictionary of tensors"
        hint = did_you_mean(entry, entries) or f"leave out ':{entry}'"
        raise CheckpointError(f"{path} has no entry {entry!r} of tensors, but {there}; {hint}")
    return dict(value[entry]), entry


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _what_is_wrong(path: Path, error: Exception) -> str:
    """The library's message, with the sizes when the file is shorter than its header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return f"it is {_POINTED}"
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < size else {}
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError):
            return f"{error}; copy it again"
    if size < 8 + length + end:
        return f"it is truncated, {size} bytes of {8 + length + end}; copy it again"
    return f"{error}; copy it again"
