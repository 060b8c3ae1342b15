"""Weights that several ranks wrote, each its part: one safetensors file of each rank, with pieces of tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch

from sftk.errors import CheckpointError
from sftk.models.tensor_files import Piece, Stored, read_safetensors

PIECES = "pieces"
"""Key of a file's metadata: name to where its piece begins, and the shape of the whole tensor."""

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def shard_name(stem: str, rank: int, ranks: int) -> str:
    """The file of a rank; a single one writes whole tensors.

    Example:
        >>> shard_name("generator", 0, 1), shard_name("generator", 0, 4)
        ('generator.safetensors', 'generator-00001-of-00004.safetensors')
    """
    return f"{stem}.safetensors" if ranks == 1 else f"{stem}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def shard_stem(file: Path) -> str | None:
    """The weights that a file begins: its stem, or None for another rank's part of them.

    Example:
        >>> names = "a.ema.safetensors", "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"
        >>> [shard_stem(Path(name)) for name in names]
        ['a.ema', 'a', None]
    """
    found = _NAME.fullmatch(file.name)
    if found is None:
        return file.name.removesuffix(".safetensors")
    return found[1] if int(found[2]) == 1 else None


def pieces_metadata(places: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> dict[str, str]:
    """What a file says about its pieces.

    Args:
        places: name to where the piece begins, and the shape of the whole tensor.
    """
    return {PIECES: json.dumps({name: [list(offsets), list(shape)] for name, (offsets, shape) in places.items()})}


def read_shards(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """What lies in a safetensors file and, if it holds pieces, in the other ranks' beside it; and its metadata.

    Args:
        path: a whole file, or the file of any rank.

    Raises:
        CheckpointError: a file is missing or broken, or the pieces do not make up the tensors.
    """
    stored, metadata = read_safetensors(path)
    name = _NAME.fullmatch(path.name)
    if PIECES not in metadata:
        return stored, metadata
    if name is None:
        raise CheckpointError(f"{path} holds pieces of tensors; name it as it was written, such as generator-00001-of-00004")
    ranks = int(name[3])
    found: dict[str, Stored] = {}
    for rank in range(ranks):
        file = path.with_name(shard_name(name[1], rank, ranks))
        if not file.is_file():
            raise CheckpointError(f"{path} is one of {ranks} files, and {file.name} is not beside it; copy it there")
        here, about = read_safetensors(file)
        places = json.loads(about.get(PIECES, "{}"))
        for key, item in here.items():
            offsets, shape = places[key]
            piece = Piece(file=file, offsets=tuple(offsets), shape=item.shape)
            known = found.get(key) or attrs.evolve(item, file=path, shape=tuple(shape), bytes=0)
            found[key] = attrs.evolve(known, bytes=known.bytes + item.bytes, pieces=(*known.pieces, piece))
    for key, item in found.items():
        held = sum(torch.Size(piece.shape).numel() for piece in item.pieces)
        if held != torch.Size(item.shape).numel():
            raise CheckpointError(f"{path}: the pieces of {key} hold {held} values of {torch.Size(item.shape).numel()}")
    return found, metadata
