"""Video files as clips of one size and frame rate, decoded with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import torch
from torch import Tensor

from sftk.data.pictures import cover
from sftk.errors import DataError

SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv", ".y4m"})
_EARLY = 1e-6
_LOST = 0.02


def find_videos(folder: Path) -> tuple[Path, ...]:
    """Every video file in a folder and the folders in it, sorted by path.

    Raises:
        DataError: there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder {folder}; expected a folder of video files")
    found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))
    if not found:
        raise DataError(f"{folder} holds no video; expected files that end in {', '.join(sorted(SUFFIXES))}")
    return found


def read_clips(path: Path, *, frames: int, height: int, width: int, fps: float | None = None) -> Iterator[Tensor]:
    """Clips of a video, one after the other without overlap; what is left at the end is dropped.

    Args:
        path: a video file.
        frames: of a clip.
        height, width: in pixels; pictures are scaled to cover them and cut at the centre.
        fps: frames a second, from which the nearest earlier pictures are taken; None takes every picture.

    Yields:
        [frames, 3, height, width] float32 in [0, 1].

    Raises:
        DataError: the file cannot be decoded, ends early, or holds no whole clip.
    """
    pictures, clips = sample_pictures(path, fps), 0
    while True:
        part = list(islice(pictures, frames))
        if len(part) < frames:
            if clips == 0:
                at = "" if fps is None else f" at {fps:g} a second"
                raise DataError(f"{path} has {len(part)} frames{at}, expected at least {frames}")
            return
        clips += 1
        yield cover(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).float() / 255, height, width)


def sample_pictures(path: Path, fps: float | None = None) -> Iterator[np.ndarray]:
    """Pictures of a video at even times.

    Args:
        path: a video file.
        fps: frames a second; None yields every picture.

    Yields:
        [H, W, 3] uint8.

    Raises:
        DataError: the file cannot be decoded, or ends early.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} has no video in it")
            yield from _sample(container, container.streams.video[0], fps, path)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot decode the video {path}: {reason}") from error


def _sample(container: Any, stream: Any, fps: float | None, path: Path) -> Iterator[np.ndarray]:
    stream.thread_type = "AUTO"
    rate = stream.average_rate or Fraction(25)
    shown, decoded, first, picture, time = 0, 0, None, None, 0.0
    for frame in container.decode(stream):
        first = frame.time if first is None else first
        time = decoded / float(rate) if frame.time is None or first is None else frame.time - first
        decoded += 1
        if fps is None:
            yield frame.to_ndarray(format="rgb24")
            continue
        while picture is not None and shown / fps < time - _EARLY:
            yield picture.to_ndarray(format="rgb24")
            shown += 1
        picture = frame
    if decoded < stream.frames * (1 - _LOST) - 1:
        raise DataError(f"the video {path} is damaged: {decoded} of its {stream.frames} frames can be decoded")
    while fps is not None and picture is not None and shown / fps < time + 1 / float(rate) - _EARLY:
        yield picture.to_ndarray(format="rgb24")
        shown += 1
