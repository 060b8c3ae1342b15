"""What a store, a prompt file or an image folder holds, in words and as a contact sheet: `sftk data inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sftk.data.choices import Choice
from sftk.data.codecs import make_codec
from sftk.data.embeddings import KIND, EmbeddingStore
from sftk.data.image_captions import load_image, read_items
from sftk.data.lmdb_layout import is_environment, read_about
from sftk.data.lmdb_store import LatentStore
from sftk.data.prompts import read_prompts
from sftk.data.video import SUFFIXES
from sftk.errors import DataError
from sftk.runtime.sheets import contact_sheet
from sftk.spec.dump import dump_yaml
from sftk.spec.wording import counted

_THUMBNAIL = 160


@attrs.frozen(kw_only=True)
class Inspection:
    """Lines to print, what was left out, and the contact sheet, if one could be drawn."""

    lines: tuple[str, ...]
    bad: tuple[str, ...] = ()
    sheet: Path | None = None


def inspect_data(path: Path, sheet: Path, *, codec: Choice | None = None, rows: int = 6, skip_bad: bool = False) -> Inspection:
    """Describes data on disk.

    Args:
        path: a store of latents or of embeddings, a prompt file, or an image folder or its metadata file.
        sheet: where the contact sheet goes.
        codec: decodes latents; by default the one that the store was encoded with. Without any, the first three channels are
            shown as red, green and blue.
        rows: how many samples are shown, spread over all.
        skip_bad: go on after what cannot be used.

    Raises:
        DataError: there is nothing of these kinds, or it is damaged.
    """
    if path.suffix == ".json" or any(path.glob("target_crop_info_*.json")):
        return _images(path, sheet, rows)
    if path.is_file():
        prompts = read_prompts(path)
        lines = (f"{path}: {counted(len(prompts), 'prompt')}", *_some(prompts, rows))
        return Inspection(lines=lines)
    if is_environment(path) and read_about(path).get("kind") == KIND:
        return _embeddings(EmbeddingStore.open(path), rows)
    if not is_environment(path) and not any(is_environment(folder) for folder in path.iterdir()):
        videos = any(file.suffix.lower() in SUFFIXES for file in path.rglob("*"))
        hint = "it holds videos, which `sftk data encode` makes a store of" if videos else "name the folder of one of these"
        raise DataError(f"{path} is no store, no prompt file and no folder of captioned images; {hint}")
    return _store(LatentStore.open(path, skip_bad=skip_bad), sheet, codec, rows)


def _images(path: Path, sheet: Path, rows: int) -> Inspection:
    items = read_items(path)
    shown = [items[index] for index in _spread(len(items), rows)]
    pictures = [(item.caption, load_image(item, _THUMBNAIL, _THUMBNAIL)[None].permute(0, 2, 3, 1)) for item in shown]
    kinds = ", ".join(sorted({str(item.kind) for item in items}))
    lines = (f"{path}: {len(items)} captioned images ({kinds})", *_some([item.caption for item in items], rows))
    return Inspection(lines=lines, sheet=contact_sheet(sheet, pictures))


def _embeddings(store: EmbeddingStore, rows: int) -> Inspection:
    prompts = store.prompts()
    size = (store.path / "data.mdb").stat().st_size
    mean = sum(prompts.values()) / max(1, len(prompts))
    about = {key: value for key, value in read_about(store.path).items() if key in ("use", "with")}
    return Inspection(
        lines=(
            f"{store.path}: {len(prompts)} prompt embeddings of up to {store.shape[0]} x {store.shape[1]}, {store.format}, "
            f"{mean:.1f} rows on average, {size / 1e6:.1f} MB",
            *_facts(about),
            *_some(sorted(prompts), rows),
        )
    )


def _store(store: LatentStore, sheet: Path, codec: Choice | None, rows: int) -> Inspection:
    about = read_about(store.shards[0].folder)
    picked = _spread(len(store), rows)
    records = [store[index] for index in picked]
    values = torch.stack([latents for latents, _ in records])
    steps, *clip = store.shape
    size = sum((shard.folder / "data.mdb").stat().st_size for shard in store.shards)
    states = f", {steps} states each" if steps > 1 else ""
    places = counted(len(store.shards), "environment")
    lines = [
        f"{store.path}: {len(store)} records in {places}, {size / 1e6:.1f} MB",
        f"latents {clip} (frames, channels, height, width){states}; of those shown: mean {values.mean():.3f}, "
        f"standard deviation {values.std():.3f}, from {values.min():.2f} to {values.max():.2f}",
        *_facts(about),
        *(f"  {index}: {prompt}" for index, (_, prompt) in zip(picked, records, strict=True)),
    ]
    chosen = codec or about.get("codec")
    clips = [
        (prompt if steps == 1 else f"{prompt} (state {state + 1} of {steps})", _show(latents[state], chosen))
        for latents, prompt in records[: rows if steps == 1 else max(1, rows // steps)]
        for state in range(steps)
    ]
    title = f"{store.path.name}: {len(store)} records" + ("" if chosen else "; first three channels")
    return Inspection(lines=tuple(lines), bad=store.bad, sheet=contact_sheet(sheet, clips, title=title))


def _show(latents: Tensor, codec: Any) -> Tensor:
    """Latents [F, C, H, W] as pictures [F, H, W] or [F, H, W, 3]."""
    if codec is not None:
        pictures = make_codec(codec).decode(latents[None])[0]
        return pictures if pictures.dim() == 3 else pictures.permute(0, 2, 3, 1)
    colours = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
    low, high = colours.amin(), colours.amax()
    return ((colours - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1)


def _spread(count: int, rows: int) -> list[int]:
    """At most `rows` indices, evenly spread."""
    return torch.linspace(0, count - 1, min(count, rows)).round().int().tolist()


def _facts(about: Mapping[str, Any]) -> list[str]:
    """What a store was made of, as YAML."""
    return dump_yaml(dict(about)).splitlines() if about else []


def _some(texts: Any, rows: int) -> list[str]:
    return [f"  {index}: {texts[index] or '(empty)'}" for index in _spread(len(texts), rows)]
