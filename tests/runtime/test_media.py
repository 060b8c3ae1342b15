"""Videos decode back to what was written; captions move no pixel of a clip."""

from __future__ import annotations

import builtins
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sftk.errors import DataError, NonFiniteError, SftkError, ShapeError
from sftk.runtime import media, sheets


def moving_dot(frames: int = 21, size: int = 16) -> np.ndarray:
    clip = np.zeros((frames, size, size), np.uint8)
    for f in range(frames):
        clip[f, size // 2, f % size] = 255
    return clip


def decode(path: Path) -> tuple[np.ndarray, float, str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.average_rate is not None
        return frames, float(stream.average_rate), stream.codec_context.name


def gif_frames(path: Path) -> tuple[list[np.ndarray], int]:
    with Image.open(path) as image:
        out = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            out.append(np.asarray(image.convert("RGB")))
        return out, image.info["duration"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_floats_round_and_clip(dtype: torch.dtype):
    frames = torch.tensor([[[-0.5, 0.0, 0.25, 1.0, 1.5]]], dtype=dtype, requires_grad=True)
    np.testing.assert_array_equal(media.to_uint8(frames), [[[0, 0, 64, 255, 255]]])


def test_uint8_is_kept():
    clip = moving_dot()
    np.testing.assert_array_equal(media.to_uint8(torch.from_numpy(clip)), clip)


@pytest.mark.parametrize("shape", [(16, 16), (4, 3, 16, 16), (0, 16, 16), (2, 4, 16, 16, 3)])
def test_wrong_axes_are_named(shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match="expected \\[F, H, W\\]"):
        media.to_uint8(np.zeros(shape, np.uint8))


def test_wrong_values_are_named():
    with pytest.raises(DataError, match="int64"):
        media.to_uint8(np.zeros((1, 2, 2), np.int64))
    with pytest.raises(NonFiniteError):
        media.to_uint8(np.full((1, 2, 2), np.nan))


def test_mp4_decodes_back(tmp_path: Path):
    clip = moving_dot()
    frames, fps, codec = decode(media.write_mp4(tmp_path / "new" / "clip.mp4", clip, fps=8))
    assert frames.shape == (21, 256, 256, 3)
    assert fps == 8
    assert codec in ("h264", "mpeg4")
    magnified = clip.repeat(16, axis=1).repeat(16, axis=2)[..., None]
    assert np.abs(frames.astype(int) - magnified).mean() < 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("shape", "scale", "size"), [((3, 33, 47), 1, (34, 48)), ((3, 33, 47, 3), 3, (100, 142)), ((3, 300, 261), None, (300, 262))]
)
def test_mp4_sizes_are_even(tmp_path: Path, shape: tuple[int, ...], scale: int | None, size: tuple[int, int]):
    clip = np.full(shape, 200, np.uint8)
    frames, fps, _ = decode(media.write_mp4(tmp_path / "clip.mp4", clip, fps=29.97, scale=scale))
    assert frames.shape == (3, *size, 3)
    assert fps == pytest.approx(29.97, abs=1e-3)
    assert np.abs(frames.astype(int) - 200).max() < 8


def test_mp4_without_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    frames, _, codec = decode(media.write_mp4(tmp_path / "clip.mp4", moving_dot(), fps=16))
    assert (len(frames), codec) == (21, "mpeg4")


def test_mp4_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_av(name: str, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    assert not media.can_write_mp4()
    with pytest.raises(SftkError, match="pip install av, or use write_gif"):
        media.write_mp4(tmp_path / "clip.mp4", moving_dot(), fps=8)


def test_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "clip.mp4").write_text("old")
    monkeypatch.setattr(np, "pad", lambda clip, *args, **kwargs: clip.astype(np.int64))
    with pytest.raises(ValueError, match="dtype"):
        media.write_mp4(tmp_path / "clip.mp4", moving_dot(), fps=8)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("clip.mp4", "old")]


@pytest.mark.parametrize("fps", [0, -8, float("nan")])
def test_fps_is_positive(tmp_path: Path, fps: float):
    for write in (media.write_mp4, media.write_gif):
        with pytest.raises(DataError, match="frames per second"):
            write(tmp_path / "clip", moving_dot(), fps)


def test_grey_gif_is_exact(tmp_path: Path):
    clip = moving_dot(frames=12)
    frames, duration = gif_frames(media.write_gif(tmp_path / "clip.gif", clip, fps=8))
    assert (len(frames), duration) == (12, 120)
    np.testing.assert_array_equal(np.stack(frames)[..., 0], clip.repeat(16, axis=1).repeat(16, axis=2))


def test_colour_gif_keeps_few_colours(tmp_path: Path):
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    for f in range(5):
        clip[f, :, 4 * f : 4 * f + 8] = (200, 30, 90)
    frames, _ = gif_frames(media.write_gif(tmp_path / "clip.gif", clip, fps=10, scale=1))
    assert np.abs(np.stack(frames).astype(int) - clip).max() <= 8


def test_grid_holds_every_clip():
    short, long = moving_dot(frames=4), moving_dot(frames=9)
    grid = sheets.video_grid([("a prompt", [short, long]), ("another", [long, long])], columns=["teacher", "student"])
    assert grid.shape[0] == 9
    assert grid.shape[1] % 2 == grid.shape[2] % 2 == 0
    assert grid.dtype == np.uint8
    # Black cells on white paper: find the first one and compare it, magnified eight times, in every frame.
    dark = (grid[0].max(axis=-1) == 0).sum(axis=1) > 200
    top = int(np.argmax(dark))
    left = int(np.argmax((grid[0, top] == 0).all(axis=-1)))
    cell = grid[:, top : top + 128, left : left + 128, 0]
    held = short[np.minimum(np.arange(9), 3)].repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_array_equal(cell, held)


def test_grid_shrinks_large_clips():
    assert sheets.video_grid([("", [np.zeros((2, 480, 832, 3), np.uint8)])], columns=["wan"]).shape[2] < 600


def test_grid_of_unequal_rows_is_an_error():
    with pytest.raises(ShapeError, match="1 clips for 2 columns"):
        sheets.video_grid([("a", [moving_dot()])], columns=["teacher", "student"])


def test_contact_sheet_shows_first_and_last(tmp_path: Path):
    ramp = np.broadcast_to(np.linspace(10, 250, 21).astype(np.uint8)[:, None, None], (21, 16, 16))
    path = sheets.contact_sheet(tmp_path / "sheet.png", [("", ramp)], columns=5, title="A title <&> that is long " * 9)
    with Image.open(path) as image:
        pixels = np.asarray(image)
    assert [int((pixels[..., 0] == value).sum()) >= 64 * 64 for value in (10, 70, 130, 190, 250)] == [True] * 5


def test_contact_sheet_of_short_clips(tmp_path: Path):
    path = sheets.contact_sheet(tmp_path / "sheet.png", [("one", moving_dot(1)), ("word" * 60, moving_dot(3))], columns=11)
    with Image.open(path) as image:
        assert image.width < 500
