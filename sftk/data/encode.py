"""Video folders to a store of latents: `sftk data encode`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sftk.data.choices import Choice
from sftk.data.codecs import Codec, make_codec
from sftk.data.lmdb_writer import ShardWriter
from sftk.data.video import find_videos, read_clips
from sftk.errors import DataError, SftkError

CAPTIONS = "captions.jsonl"
"""File of captions that is looked for in a video folder."""


@attrs.frozen(kw_only=True)
class Encoding:
    """How videos become latents.

    Args:
        codec: see `sftk.data.codecs`.
        frames: latent frames of a clip.
        height, width: in pixels; the codec's factor divides them.
        fps: frames a second; None takes every picture of a video.
        every_clip: all clips of a video, one after the other, instead of its first.

    Raises:
        DataError: the codec is unknown, or its factor does not divide a side.
    """

    codec: Choice
    frames: int
    height: int
    width: int
    fps: float | None = None
    every_clip: bool = False

    def coder(self) -> Codec:
        """The codec, checked against the size."""
        coder = make_codec(self.codec)
        if self.frames < 1 or self.height % coder.factor or self.width % coder.factor:
            size = f"{self.frames} frames of {self.height}x{self.width}"
            raise DataError(
                f"cannot encode {size}: expected at least 1 frame, and sides that the codec's {coder.factor} divides"
            )
        return coder

    def record_shape(self, coder: Codec) -> tuple[int, int, int, int]:
        """F, C, H, W of a record."""
        return self.frames, coder.channels, self.height // coder.factor, self.width // coder.factor


@attrs.frozen(kw_only=True)
class Encoded:
    """What `encode_folder` did: clips written now, videos that were there already, and what was left out, and why."""

    clips: int
    there: int
    bad: tuple[str, ...]


def encode_folder(
    folder: Path,
    out: Path,
    encoding: Encoding,
    *,
    captions: Path | None = None,
    skip_bad: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Encoded:
    """Encodes every video of a folder. The clips of one video are written at once, so that it may be stopped at any moment.

    Args:
        folder: of videos, with folders in it or not.
        out: the store; videos that are in it already are left out.
        captions: a file of JSON lines; by default `captions.jsonl` in the folder, if there is one. A video's own `.txt` counts
            first.
        skip_bad: leave out videos that cannot be used, and list them.
        report: called with the videos done, from 0 on, and their number.

    Raises:
        DataError: a video cannot be decoded, is too short or has no caption; the store was made otherwise.
    """
    coder = encoding.coder()
    videos = find_videos(folder)
    texts = read_captions(captions or folder / CAPTIONS, needed=captions is not None)
    clips, there, bad = 0, 0, []
    report(0, len(videos))
    with ShardWriter(out, encoding.record_shape(coder), about=attrs.asdict(encoding)) as writer:
        for number, path in enumerate(videos):
            name = path.relative_to(folder).as_posix()
            if writer.get(_source_key(name)) is not None:
                there += 1
            else:
                try:
                    caption = caption_of(path, name, texts)
                    latents = _encode(path, encoding, coder)
                    writer.append(latents, [caption] * len(latents), {_source_key(name): name.encode()})
                    clips += len(latents)
                except SftkError as error:
                    if not skip_bad:
                        raise DataError(f"{error}; mend or remove it, or leave such videos out with --skip-bad") from error
                    bad.append(str(error))
            report(number + 1, len(videos))
    return Encoded(clips=clips, there=there, bad=tuple(bad))


@torch.no_grad()
def _encode(path: Path, encoding: Encoding, coder: Codec) -> list[Tensor]:
    pictures = coder.pixel_frames(encoding.frames)
    clips = read_clips(path, frames=pictures, height=encoding.height, width=encoding.width, fps=encoding.fps)
    return [coder.encode(clip) for clip in islice(clips, None if encoding.every_clip else 1)]


def caption_of(path: Path, name: str, texts: Mapping[str, str]) -> str:
    """A video's caption: its sidecar `.txt`, else the entry of that name.

    Raises:
        DataError: it has none, or an empty one.
    """
    sidecar = path.with_suffix(".txt")
    if sidecar.is_file():
        try:
            text = " ".join(sidecar.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise DataError(f"{sidecar} is not UTF-8: {error}") from error
    else:
        text = texts.get(name, "")
    if not text:
        raise DataError(
            f"{path} has no caption; expected text in {sidecar.name} beside it, or a line for {name!r} in {CAPTIONS}"
        )
    return text


def read_captions(path: Path, *, needed: bool = True) -> dict[str, str]:
    """Captions by file name, from lines `{"file_name": ..., "caption": ...}`.

    Args:
        path: UTF-8.
        needed: a missing file is an error.

    Raises:
        DataError: the file is missing, or a line says something else.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "captions.jsonl"
        >>> _ = file.write_text('{"file_name": "a.mp4", "caption": "a fox"}')
        >>> read_captions(file)
        {'a.mp4': 'a fox'}
    """
    if not path.is_file():
        if needed:
            raise DataError(f"no caption file {path}; expected JSON lines with file_name and caption")
        return {}
    texts: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
            texts[value["file_name"]] = " ".join(value["caption"].split())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f'{path}:{number}: expected {{"file_name": ..., "caption": ...}}, found {line[:80]!r}') from error
    return texts


def _source_key(name: str) -> bytes:
    """LMDB keys are short, so that a path is hashed."""
    return b"sftk_source_" + hashlib.sha256(name.encode()).hexdigest().encode()
