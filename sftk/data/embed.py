"""Prompts to a store of embeddings: `sftk data embed`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sftk.data.choices import Choice, split_choice
from sftk.data.embedders import Embedder, make_embedder
from sftk.data.embeddings import FORMATS, KIND, Format, embedding_key, text_key
from sftk.data.image_captions import read_items
from sftk.data.lmdb_layout import ABOUT, get_value, open_environment, prompt_key
from sftk.data.lmdb_store import LatentStore
from sftk.data.lmdb_writer import check_about, open_for_writing, put_values
from sftk.data.prompts import read_prompts
from sftk.errors import DataError


@attrs.frozen
class Embedded:
    """What `embed_prompts` did: prompts embedded now, and prompts that were there already or came twice."""

    written: int
    there: int


def embed_prompts(
    prompts: Iterable[str],
    out: Path,
    text: Choice,
    *,
    format: Format = "bf16",
    batch: int = 16,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Embeds prompts into a store. It may be killed at any moment and started again, and prompts may be added later.

    Args:
        prompts: in any order; one that is there is not embedded again.
        out: the store; made when it is missing.
        text: the embedder.
        format: of the stored rows.
        batch: prompts that are embedded and written together, in one transaction.
        report: called with the prompts done, from 0 on, and their number.

    Raises:
        DataError: the store was made with another embedder or format, or an embedding is not finite in the format.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "embeds"
        >>> embed_prompts(["a 3 moving left", "a 7 moving up", "a 3  moving left"], path, "digits")
        Embedded(written=2, there=1)
    """
    embedder = make_embedder(text)
    given = list(prompts)
    wanted = {embedding_key(prompt): prompt for prompt in given}
    with open_for_writing(out) as environment:
        with environment.begin() as transaction:
            found = transaction.get(ABOUT)
            empty = transaction.stat()["entries"] == 0
            missing = [(key, prompt) for key, prompt in wanted.items() if transaction.get(key) is None]
        about = _about(embedder, text, format)
        if not empty:
            check_about(out, json.loads(found) if found else {"kind": "something else"}, about)
        put_values(environment, {ABOUT: json.dumps(about, sort_keys=True, ensure_ascii=False).encode()})
        for start in range(0, len(missing), batch):
            report(start, len(missing))
            part = missing[start : start + batch]
            rows = true_rows(embedder, [prompt for _, prompt in part])
            values = {text_key(prompt): prompt.encode() for _, prompt in part}
            values |= {key: _bytes(one, format, prompt) for (key, prompt), one in zip(part, rows, strict=True)}
            put_values(environment, values)
    report(len(missing), len(missing))
    return Embedded(written=len(missing), there=len(given) - len(missing))


def true_rows(embedder: Embedder, prompts: Sequence[str]) -> list[Tensor]:
    """The rows [n, D] of each prompt without padding: the embedder's `rows`, or its rows up to the last that is not zero.

    Example:
        >>> [rows.shape for rows in true_rows(make_embedder("digits"), ["a 3 moving left"])]
        [torch.Size([4, 32])]
    """
    rows = getattr(embedder, "rows", None)
    if rows is not None:
        return rows(prompts)
    filled = [(one, one.any(dim=-1).nonzero()) for one in embedder(prompts)]
    return [one[: int(places.max()) + 1] if len(places) else one[:0] for one, places in filled]


def prompts_of(path: Path) -> tuple[str, ...]:
    """The prompts of a prompt file, of a store of latents, or of a folder of captioned images.

    Raises:
        DataError: it is none of these, or damaged.
    """
    if path.suffix == ".json" or any(path.glob("target_crop_info_*.json")):
        return tuple(item.caption for item in read_items(path))
    if not path.is_dir():
        return read_prompts(path)
    prompts: list[str] = []
    for header in LatentStore.open(path).shards:
        with open_environment(header.folder).begin() as transaction:
            values = [get_value(transaction, prompt_key(index), header.folder) for index in range(header.count)]
        for index, value in enumerate(values):
            if value is None:
                raise DataError(f"{header.folder}, record {index}: the key {prompt_key(index).decode()} is missing")
            prompts.append(bytes(value).decode())
    return tuple(prompts)


def _about(embedder: Embedder, text: Choice, format: str) -> Mapping[str, Any]:
    name, options = split_choice(text)
    # Where it computes does not change what it computes.
    options = {key: value for key, value in options.items() if key not in ("device", "offload")}
    length, width = embedder.shape
    return {"kind": KIND, "use": name, "with": options, "text_len": length, "text_dim": width, "format": format}


def _bytes(rows: Tensor, format: str, prompt: str) -> bytes:
    half = rows.detach().to("cpu", FORMATS[format]).contiguous()
    if not half.isfinite().all():
        raise DataError(f"the embedding of {prompt[:60]!r} is not finite in {format}; use the format bf16")
    return half.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
