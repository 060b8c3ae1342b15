"""Folders of images with captions, in the metadata layout of Self-Forcing: the given first frame of image-to-video.

`target_crop_info_<w>-<h>.json` lies beside the folder `<w>-<h>/` (an aspect ratio, or a size). Its items have `file_name`,
`caption`, `target_crop: {target_bbox, target_ratio}`, `type`, `origin_width` and `origin_height`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sftk.data.choices import Choice, FilePath
from sftk.data.codecs import Codec, check_codec, make_codec
from sftk.data.embedders import make_embedder, text_shapes
from sftk.data.pictures import cover
from sftk.data.prompts import TextKeys
from sftk.errors import DataError

_METADATA = re.compile(r"target_crop_info_(\d+-\d+)\.json")


@attrs.frozen(kw_only=True)
class ImageItem:
    """One image of a folder.

    Args:
        path: the file.
        caption: its text.
        bbox: left, top, right and bottom in the original picture, or None.
        ratio: the aspect ratio that the box was chosen for, such as `26-15`.
        kind: whatever `type` says.
        origin: width and height of the original picture.
    """

    path: Path
    caption: str
    bbox: tuple[int, int, int, int] | None = None
    ratio: str | None = None
    kind: str | None = None
    origin: tuple[int, int] | None = None


def read_items(path: str | Path) -> tuple[ImageItem, ...]:
    """The items of a folder.

    Args:
        path: a folder with one metadata file, or the metadata file itself.

    Raises:
        DataError: there is none or several, it is no such list, or an item lacks something.
    """
    metadata = _metadata_file(Path(path))
    match = _METADATA.fullmatch(metadata.name)
    if match is None:
        raise DataError(f"{metadata} is not named target_crop_info_<w>-<h>.json")
    try:
        values = json.loads(metadata.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{metadata} is no JSON: {error}") from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{metadata} holds no list of items")
    return tuple(_item(value, metadata, index, metadata.parent / match[1]) for index, value in enumerate(values))


def _metadata_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("target_crop_info_*.json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{path} has {len(found)} metadata files ({names}); expected one target_crop_info_<w>-<h>.json, or name it"
        )
    return found[0]


def _item(value: Any, metadata: Path, index: int, folder: Path) -> ImageItem:
    where = f"{metadata}, item {index}"
    if not isinstance(value, dict):
        raise DataError(f"{where} is no mapping")
    for key in ("file_name", "caption"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            raise DataError(f"{where} has no {key!r}")
    crop = value.get("target_crop") or {}
    bbox = crop.get("target_bbox")
    if bbox is not None and (len(bbox) != 4 or bbox[0] >= bbox[2] or bbox[1] >= bbox[3]):
        raise DataError(f"{where}: target_bbox is {bbox}; expected left, top, right, bottom")
    sizes = (value.get("origin_width"), value.get("origin_height"))
    return ImageItem(
        path=folder / value["file_name"],
        caption=value["caption"].strip(),
        bbox=None if bbox is None else (int(bbox[0]), int(bbox[1]), int(bbox[2]), int(bbox[3])),
        ratio=crop.get("target_ratio"),
        kind=value.get("type"),
        origin=None if None in sizes else (int(sizes[0] or 0), int(sizes[1] or 0)),
    )


def load_image(item: ImageItem, height: int, width: int) -> Tensor:
    """An item's picture: cut to its box where it still has its original size, scaled to cover, cut at the centre.

    Args:
        height, width: in pixels.

    Returns:
        [3, H, W] float32 in [0, 1].

    Raises:
        DataError: the file is missing or no whole image.
    """
    try:
        with Image.open(item.path) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {item.path}: {error}") from error
    if item.bbox is not None and picture.size == item.origin:
        picture = picture.crop(item.bbox)
    return cover(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255, height, width)[0]


def _damage(item: ImageItem) -> str | None:
    """What is wrong with an item's file, or None."""
    try:
        with Image.open(item.path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        return f"cannot read the image {item.path}: {error}"
    return None


@attrs.frozen(eq=False)
class ImageCaptions:
    """A map-style data set of captioned images, as the first frames that image-to-video continues.

    Args:
        path: the folder or its metadata file.
        text, codec: embed the captions, encode the images.
        channels, height, width: of the latents.
        negative: the unconditional prompt.
        skip_bad: leave out images that are missing or damaged; `bad` lists them. Opens every file once.
        frames, seed: not used.

    Keys of a sample:
        initial_latents [F0, C, H, W] float32, what the codec makes of one picture; prompt str; prompt_embeds, negative_embeds.

    Raises:
        DataError: the folder cannot be used, or the codec makes other latents.
    """

    path: FilePath
    text: Choice
    codec: Choice
    channels: int
    height: int
    width: int
    negative: str = ""
    skip_bad: bool = False
    frames: int = 1
    seed: int = 0
    items: tuple[ImageItem, ...] = attrs.field(init=False, repr=False)
    bad: tuple[str, ...] = attrs.field(init=False, repr=False)
    coder: Codec = attrs.field(init=False, repr=False)
    keys: TextKeys = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        coder = make_codec(self.codec)
        check_codec(coder, self.channels, str(self.path))
        items = read_items(self.path)
        found = [_damage(item) for item in items] if self.skip_bad else []
        good = tuple(item for item, problem in zip(items, found, strict=True) if problem is None) if self.skip_bad else items
        if not good:
            raise DataError(f"{self.path} holds no usable image: {found[0]}")
        object.__setattr__(self, "items", good)
        object.__setattr__(self, "bad", tuple(problem for problem in found if problem is not None))
        object.__setattr__(self, "coder", coder)
        object.__setattr__(self, "keys", TextKeys(make_embedder(self.text), self.negative))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        picture = load_image(item, self.height * self.coder.factor, self.width * self.coder.factor)
        return {"initial_latents": self.coder.encode(picture[None]), **self.keys(item.caption)}


def image_shapes(*, text: Choice, channels: int, height: int, width: int, **_: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a sample's tensors, known without the images."""
    return {"initial_latents": (1, channels, height, width), **text_shapes(text)}
