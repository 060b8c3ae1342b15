"""Videos in and out: MP4, GIF, captioned grids and contact sheets of generated clips."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from sftk.errors import DataError, NonFiniteError, SftkError, ShapeError
from sftk.runtime.captions import font, text_height, text_width, wrap

Frames = np.ndarray | torch.Tensor

_INK, _FAINT, _PAPER = (28, 30, 33), (120, 124, 130), (255, 255, 255)
_GAP = 8


def to_uint8(frames: Frames) -> np.ndarray:
    """Frames as a uint8 array in [0, 255], on the host.

    Args:
        frames: [F, H, W] (grey) or [F, H, W, 3] (RGB), F >= 1; uint8, or floats in [0, 1] (values outside are clipped).

    Raises:
        ShapeError: other axes.
        DataError: another dtype.
        NonFiniteError: floats with NaN or infinity among them.

    Example:
        >>> to_uint8(torch.tensor([[[0.0, 0.5, 1.2]]]))
        array([[[  0, 128, 255]]], dtype=uint8)
    """
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu()
        frames = (frames.float() if frames.is_floating_point() else frames).numpy()
    if frames.ndim not in (3, 4) or (frames.ndim == 4 and frames.shape[-1] != 3) or 0 in frames.shape:
        raise ShapeError(f"frames have shape {list(frames.shape)}; expected [F, H, W] or [F, H, W, 3], none of them empty")
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise DataError(f"frames are {frames.dtype}; expected uint8 or floats in [0, 1]")
    if not np.isfinite(frames).all():
        raise NonFiniteError("frames hold NaN or infinite values; expected floats in [0, 1]")
    return (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def can_write_mp4() -> bool:
    """Whether `write_mp4` works here, that is, whether PyAV can be imported.

    Example:
        >>> can_write_mp4()
        True
    """
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def write_mp4(path: str | Path, frames: Frames, fps: float, scale: int | None = None) -> Path:
    """Write frames as an MP4 that browsers play (H.264; MPEG-4 part 2 where PyAV has no H.264 encoder).

    Args:
        path: the file; its folder is created, and it appears only when it is complete.
        frames: see `to_uint8`.
        fps: frames per second.
        scale: nearest-neighbour magnification; by default the least whole one that makes the shorter side 256 pixels.

    Raises:
        SftkError: PyAV cannot be imported (`can_write_mp4`).
        DataError: fps is not positive.

    Example:
        >>> import tempfile
        >>> write_mp4(Path(tempfile.mkdtemp()) / "clip.mp4", np.zeros((4, 16, 16), np.uint8), fps=8).name
        'clip.mp4'
    """
    with open_mp4(path, fps, scale) as write:
        write(frames)
    return Path(path)


@contextmanager
def open_mp4(path: str | Path, fps: float, scale: int | None = None) -> Iterator[Callable[[Frames], None]]:
    """Write an MP4 part by part, so that a long video need not be held; arguments and errors as in `write_mp4`.

    Yields:
        A function that appends frames; all of one size.

    Example:
        >>> import tempfile
        >>> with open_mp4(Path(tempfile.mkdtemp()) / "clip.mp4", fps=8) as write:
        ...     for _ in range(3):
        ...         write(np.zeros((4, 16, 16), np.uint8))
    """
    try:
        import av
    except ImportError as error:
        raise SftkError(f"write_mp4 needs PyAV ({error}); pip install av, or use write_gif") from error
    _check_fps(fps)
    encoders = [name for name in ("libx264", "libopenh264") if name in av.codecs_available] + ["mpeg4"]
    quality = {"crf": "18"} if encoders[0] == "libx264" else {}
    with complete_file(path) as part, av.open(part, "w", format="mp4", options={"movflags": "faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(encoders[0], rate=rate, options=quality)
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"

        def write(frames: Frames) -> None:
            clip = _even(_magnify(_rgb(frames), scale))
            if not stream.codec_context.is_open:
                stream.height, stream.width = clip.shape[1:3]
                if not quality:
                    stream.bit_rate = int(stream.width * stream.height * float(rate))
            for image in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))

        yield write
        container.mux(stream.encode())


def write_gif(path: str | Path, frames: Frames, fps: float, scale: int | None = None) -> Path:
    """Write frames as a GIF that loops; arguments as in `write_mp4`.

    A GIF counts time in hundredths of a second, so that 16 fps becomes 16.7. Equal neighbours share one, longer, frame.

    Example:
        >>> import tempfile
        >>> write_gif(Path(tempfile.mkdtemp()) / "clip.gif", np.zeros((4, 16, 16), np.uint8), fps=8).name
        'clip.gif'
    """
    data = gif_bytes(frames, fps, scale)
    with complete_file(path) as part:
        Path(part).write_bytes(data)
    return Path(path)


def gif_bytes(frames: Frames, fps: float, scale: int | None = None) -> bytes:
    """The GIF that `write_gif` writes, for those who embed it.

    Example:
        >>> gif_bytes(np.zeros((1, 16, 16), np.uint8), fps=8)[:6]
        b'GIF89a'
    """
    _check_fps(fps)
    clip = _magnify(to_uint8(frames), scale)
    images = [Image.fromarray(image) for image in clip]
    if clip.ndim == 4:
        # One palette for all frames: a palette for each makes still regions flicker.
        sample = clip[:: max(1, len(clip) // 16)]
        palette = Image.fromarray(sample.reshape(-1, *clip.shape[2:])).quantize(256)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    buffer = io.BytesIO()
    # Browsers slow a delay under 20 ms down to 100 ms.
    delay = max(20, 10 * round(100 / fps))
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=delay, loop=0, optimize=False)
    return buffer.getvalue()


def video_grid(rows: Sequence[tuple[str, Sequence[Frames]]], columns: Sequence[str]) -> np.ndarray:
    """Clips in a captioned grid, to compare methods on the same prompts.

    Args:
        rows: for each prompt, its text and one clip for each column; clips that end early hold their last frame.
        columns: the names above the columns (methods, say).

    Returns:
        [F, H, W, 3], uint8, even H and W; F is that of the longest clip.

    Raises:
        ShapeError: a row has not one clip for each column.

    Example:
        >>> clip = np.zeros((4, 16, 16), np.uint8)
        >>> video_grid([("a 3 moving left", [clip, clip])], columns=["teacher", "student"]).shape[0]
        4
    """
    for prompt, clips in rows:
        if len(clips) != len(columns):
            raise ShapeError(f"row {prompt!r} has {len(clips)} clips for {len(columns)} columns; expected one for each")
    if not rows or not columns:
        raise ShapeError("a video grid needs at least one row and one column")
    cells = [[_fit(_rgb(clip), low=128, high=320) for clip in clips] for _, clips in rows]
    cell_h, cell_w = (max(clip.shape[axis] for row in cells for clip in row) for axis in (1, 2))
    labels = [wrap(prompt, width=150) for prompt, _ in rows]
    names = [wrap(name, width=cell_w) for name in columns]
    left = _GAP + max((text_width(label) + _GAP for label in labels if label), default=0)
    top = _GAP + max((text_height(name) + _GAP for name in names if name), default=0)
    pitch_h = max(cell_h, *(text_height(label) for label in labels)) + _GAP

    canvas = Image.new("RGB", (left + len(columns) * (cell_w + _GAP), top + len(rows) * pitch_h), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(names):
        above = top - text_height(name) - _GAP // 2
        draw.text((left + index * (cell_w + _GAP), above), name, _INK, font=font(), spacing=2)
    for index, label in enumerate(labels):
        draw.text((_GAP, top + index * pitch_h), label, _INK, font=font(), spacing=2)
    longest = max(len(clip) for row in cells for clip in row)
    grid = np.repeat(np.asarray(canvas)[None], longest, axis=0)
    for r, row in enumerate(cells):
        for c, clip in enumerate(row):
            y, x = top + r * pitch_h, left + c * (cell_w + _GAP)
            held = np.minimum(np.arange(longest), len(clip) - 1)
            grid[:, y : y + clip.shape[1], x : x + clip.shape[2]] = clip[held]
    return _even(grid)


def side_by_side(panels: Sequence[tuple[str, Frames]]) -> np.ndarray:
    """Captioned clips in a row: a `video_grid` without prompts.

    Example:
        >>> clip = np.zeros((4, 16, 16), np.uint8)
        >>> side_by_side([("teacher", clip), ("student", clip)]).shape
        (4, 172, 280, 3)
    """
    return video_grid([("", [clip for _, clip in panels])], columns=[name for name, _ in panels])


def contact_sheet(path: str | Path, rows: Sequence[tuple[str, Frames]], columns: int = 11, title: str | None = None) -> Path:
    """A PNG with one row of evenly picked frames for each clip, the first and the last frame among them.

    Args:
        path: the file; its folder is created.
        rows: label and frames of each clip. The numbers of the picked frames, from 0, stand above the rows they hold for.
        columns: the most frames that a row shows.
        title: a heading.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sheet.png"
        >>> contact_sheet(path, [("a 3 moving left", np.zeros((21, 16, 16), np.uint8))]).name
        'sheet.png'
    """
    if not rows or columns < 1:
        raise ShapeError("a contact sheet needs at least one row and one column")
    picks = [np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int)) for _, frames in rows]
    cells = [_fit(_rgb(frames)[pick], low=64, high=160) for (_, frames), pick in zip(rows, picks, strict=True)]
    labels = [wrap(label, width=180) for label, _ in rows]
    left = 2 * _GAP + max((text_width(label) + _GAP for label in labels if label), default=0)
    width = left + max(len(cell) * (cell.shape[2] + _GAP // 2) for cell in cells) + _GAP
    heading = wrap(title or "", width=width - 4 * _GAP, size=18)
    numbers_above = [index == 0 or not np.array_equal(picks[index], picks[index - 1]) for index in range(len(rows))]
    heights = [
        max(cell.shape[1], text_height(label)) + _GAP // 2 + (22 if numbered else 0)
        for cell, label, numbered in zip(cells, labels, numbers_above, strict=True)
    ]
    top = 2 * _GAP + (text_height(heading, size=18) + _GAP if heading else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _GAP, _GAP + 2), heading, _INK, font=font(18))
    y = top
    for cell, label, pick, numbered, height in zip(cells, labels, picks, numbers_above, heights, strict=True):
        inset = 22 if numbered else 0
        draw.text((2 * _GAP, y + inset), label, _INK, font=font(), spacing=2)
        for index, image in enumerate(cell):
            x = left + index * (cell.shape[2] + _GAP // 2)
            sheet.paste(Image.fromarray(image), (x, y + inset))
            if numbered:
                draw.text((x + cell.shape[2] / 2, y + 19), str(pick[index]), _FAINT, font=font(11), anchor="ms")
        y += height
    with complete_file(path) as part:
        sheet.save(part, "PNG")
    return Path(path)


def _check_fps(fps: float) -> None:
    if not 0 < fps < math.inf:
        raise DataError(f"a video at {fps} frames per second; expected a positive number")


def _rgb(frames: Frames) -> np.ndarray:
    clip = to_uint8(frames)
    return clip if clip.ndim == 4 else np.repeat(clip[..., None], 3, axis=-1)


def _magnify(clip: np.ndarray, scale: int | None, low: int = 256) -> np.ndarray:
    factor = max(1, math.ceil(low / min(clip.shape[1:3]))) if scale is None else scale
    return clip if factor == 1 else clip.repeat(factor, axis=1).repeat(factor, axis=2)


def _fit(clip: np.ndarray, low: int, high: int) -> np.ndarray:
    """The clip with its shorter side at least `low` (whole magnification) and at most `high` (resampled down)."""
    short = min(clip.shape[1:3])
    if short <= high:
        return _magnify(clip, None, low)
    size = (round(clip.shape[2] * high / short), round(clip.shape[1] * high / short))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in clip])


def _even(clip: np.ndarray) -> np.ndarray:
    """The clip with the last row and column repeated where a size is odd; yuv420p needs even sizes."""
    odd = ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0))
    return np.pad(clip, odd, mode="edge")


@contextmanager
def complete_file(path: str | Path) -> Iterator[str]:
    """A name to write under; the file gets its real name when it is complete."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        yield str(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
