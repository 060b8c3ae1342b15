"""Frames as bytes, and as files: MP4 and GIF."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sftk.errors import DataError, NonFiniteError, SftkError, ShapeError

Frames = np.ndarray | torch.Tensor


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
            clip = even(magnify(rgb(frames), scale))
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
    clip = magnify(to_uint8(frames), scale)
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


def _check_fps(fps: float) -> None:
    if not 0 < fps < math.inf:
        raise DataError(f"a video at {fps} frames per second; expected a positive number")


def rgb(frames: Frames) -> np.ndarray:
    """Frames as [F, H, W, 3], uint8; arguments and errors as in `to_uint8`."""
    clip = to_uint8(frames)
    return clip if clip.ndim == 4 else np.repeat(clip[..., None], 3, axis=-1)


def magnify(clip: np.ndarray, scale: int | None, low: int = 256) -> np.ndarray:
    """Each pixel `scale` times as large; by default so often that the shorter side has at least `low`."""
    factor = max(1, math.ceil(low / min(clip.shape[1:3]))) if scale is None else scale
    return clip if factor == 1 else clip.repeat(factor, axis=1).repeat(factor, axis=2)


def even(clip: np.ndarray) -> np.ndarray:
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
