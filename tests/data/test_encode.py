"""Encoding folders: latents, captions, resumption, and what is left out."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch

from sftk.data.digits import DigitClips, decode_latents
from sftk.data.encode import Encoding, encode_folder, read_captions
from sftk.data.lmdb_store import LatentStore
from sftk.data.sources import source
from sftk.errors import DataError

DIGITS = Encoding(codec="digits", frames=6, height=16, width=16)


def write_video(path, frames):
    """[F, H, W] in [0, 1] as a lossless video."""
    pictures = (frames * 255).round().byte().numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr0"
        for picture in pictures:
            image = np.repeat(picture[..., None], 3, axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def folder(tmp_path):
    """Four digit clips; captions in a text file, in a list, in both, in the list under a folder."""
    clips, folder = DigitClips("test", frames=13), tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(("a", "b", "c", "sub/d")):
        write_video(folder / f"{name}.mkv", decode_latents(clips[index]["latents"][None])[0])
    (folder / "a.txt").write_text(clips[0]["prompt"] + "\n")
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbf" + clips[2]["prompt"].encode())
    lines = [("b.mkv", clips[1]["prompt"]), ("c.mkv", "not this"), ("sub/d.mkv", clips[3]["prompt"])]
    (folder / "captions.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "caption": text}) for name, text in lines) + "\n\n"
    )
    return folder


def test_latents_and_captions(folder, tmp_path):
    found = encode_folder(folder, tmp_path / "out", DIGITS)
    assert (found.clips, found.there, found.bad) == (4, 0, ())
    store, clips = LatentStore.open(tmp_path / "out"), DigitClips("test", frames=13)
    assert store.shape == (1, 6, 4, 8, 8)
    for index in range(4):
        latents, prompt = store[index]
        assert prompt == clips[index]["prompt"]
        torch.testing.assert_close(latents[0], clips[index]["latents"][:6], rtol=0, atol=0.02)
    options = {"path": str(tmp_path / "out"), "text": "digits"}
    data = source("latents").build(frames=6, channels=4, height=8, width=8, seed=0, options=options)
    assert torch.equal(data[1]["prompt_embeds"], clips[1]["prompt_embeds"])


def test_every_clip(folder, tmp_path):
    found = encode_folder(folder, tmp_path / "out", Encoding(codec="digits", frames=6, height=16, width=16, every_clip=True))
    assert found.clips == 8
    latents = LatentStore.open(tmp_path / "out")[3][0][0]
    torch.testing.assert_close(latents, DigitClips("test", frames=13)[1]["latents"][6:12], rtol=0, atol=0.02)


def test_stopped_and_gone_on_with(folder, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        encode_folder(folder, tmp_path / "out", DIGITS, report=stop)
    assert len(LatentStore.open(tmp_path / "out")) == 2
    reports = []
    found = encode_folder(folder, tmp_path / "out", DIGITS, report=lambda *numbers: reports.append(numbers))
    assert (found.clips, found.there) == (2, 2)
    assert reports == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    encode_folder(folder, tmp_path / "whole", DIGITS)
    stores = [LatentStore.open(tmp_path / name) for name in ("out", "whole")]
    assert all(torch.equal(stores[0][i][0], stores[1][i][0]) for i in range(4))
    assert encode_folder(folder, tmp_path / "out", DIGITS).clips == 0


def test_bad_videos(folder, tmp_path):
    (folder / "b.mkv").write_bytes((folder / "b.mkv").read_bytes()[:300])
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a\.mkv has no caption; expected text in a.txt beside it, or a line for 'a.mkv'"):
        encode_folder(folder, tmp_path / "out", DIGITS)
    found = encode_folder(folder, tmp_path / "out", DIGITS, skip_bad=True)
    assert (found.clips, len(found.bad)) == (2, 2)
    assert "a.mkv has no caption" in found.bad[0]
    assert "b.mkv" in found.bad[1]
    (folder / "a.txt").write_text("a 3 moving left")
    assert encode_folder(folder, tmp_path / "out", DIGITS, skip_bad=True).clips == 1


def test_other_settings(folder, tmp_path):
    encode_folder(folder, tmp_path / "out", DIGITS)
    with pytest.raises(DataError, match=r"made with other settings: fps was None, is now 4.0"):
        encode_folder(folder, tmp_path / "out", Encoding(codec="digits", frames=6, height=16, width=16, fps=4.0))
    with pytest.raises(DataError, match=r"sides that the codec's 2 divides"):
        encode_folder(folder, tmp_path / "out", Encoding(codec="digits", frames=6, height=15, width=16))


@pytest.mark.parametrize("line", ["{", "[]", '{"file_name": "a"}', '{"file_name": "a", "caption": 3}'])
def test_wrong_caption_lines(tmp_path, line):
    (tmp_path / "c.jsonl").write_text('{"file_name": "a", "caption": "b"}\n' + line)
    with pytest.raises(DataError, match=r'c.jsonl:2: expected \{"file_name": ..., "caption": ...\}, found'):
        read_captions(tmp_path / "c.jsonl")


def test_a_missing_caption_file(folder, tmp_path):
    with pytest.raises(DataError, match="no caption file"):
        encode_folder(folder, tmp_path / "out", DIGITS, captions=tmp_path / "none.jsonl")
