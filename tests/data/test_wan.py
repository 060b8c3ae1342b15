"""The codec `wan_vae` and the embedder `umt5` as data sets and commands use them."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sftk.cli import main
from sftk.data import wan
from sftk.data.codecs import make_codec
from sftk.data.embedders import make_embedder
from sftk.data.lmdb_store import LatentStore
from sftk.data.wan import pick_device
from sftk.errors import CheckpointError, DataError, ShapeError
from sftk.models.vae import decode, encode, load_vae

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.AutoencoderKLWan(base_dim=4).save_pretrained(folder / "vae")
    return folder


def codec(folder, **options):
    return make_codec({"use": "wan_vae", "with": {"path": str(folder), "device": "cpu", **options}})


def test_the_codec_is_the_vae(vae_folder):
    coder, vae = codec(vae_folder), load_vae(vae_folder)
    video = torch.rand(5, 3, 16, 24)
    latents = coder.encode(video)
    assert latents.shape == (2, coder.channels, 2, 3)
    assert torch.equal(latents, encode(vae, video[None])[0])
    assert torch.equal(coder.decode(latents[None]), decode(vae, latents[None]))
    assert coder.decode(latents[None]).shape == (1, coder.pixel_frames(2), 3, 16, 24)
    assert not coder.decode(latents[None]).requires_grad


def test_nothing_is_loaded_before_it_is_used_and_then_once(vae_folder, monkeypatch):
    loads = []
    monkeypatch.setattr(wan, "_LOADED", {})
    monkeypatch.setattr(wan, "load_vae", lambda *given, **options: loads.append(given) or load_vae(*given, **options))
    first, second = codec(vae_folder), codec(vae_folder, chunk=3)
    assert (first.channels, first.factor, first.pixel_frames(21)) == (16, 8, 81)
    assert not loads
    first.decode(torch.zeros(1, 2, 16, 1, 1))
    second.decode(torch.zeros(1, 2, 16, 1, 1))
    assert len(loads) == 1


def test_options_that_do_not_fit_are_named(vae_folder):
    with pytest.raises(DataError, match=r"tiles of 64 pixels need a stride in 1..64, found 80"):
        codec(vae_folder, tile=64, stride=80)
    with pytest.raises(DataError, match=r"set channels: 16, factor: 8, temporal_factor: 4"):
        codec(vae_folder, channels=48, factor=16).decode(torch.zeros(1, 1, 48, 1, 1))
    with pytest.raises(ShapeError, match=r"expected \[F, 3, H, W\]"):
        codec(vae_folder).encode(torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(CheckpointError, match=r"no VAE at nowhere, which is no folder; expected"):
        codec("nowhere").decode(torch.zeros(1, 1, 16, 1, 1))
    with pytest.raises(DataError, match=r"unknown device 'tpv'"):
        pick_device("tpv")


def test_the_embedder_checks_the_width(text_folders):
    embedder = make_embedder({"use": "umt5", "with": {"path": str(text_folders / "hf"), "device": "cpu"}})
    assert embedder.shape == (512, 4096)
    with pytest.raises(DataError, match=r"has rows of 16; set text_dim: 16"):
        embedder(["a fox"])


def test_videos_are_encoded_and_shown_through_the_vae(vae_folder, tmp_path):
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 24, "bgr0"
        for value in range(9):
            frame = np.full((16, 24, 3), 20 * value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "videos" / "a.txt").write_text("it brightens")
    choice = json.dumps({"use": "wan_vae", "with": {"path": str(vae_folder), "device": "cpu"}})
    sizes = ["--codec", choice, "--frames", "3", "--size", "16x24"]
    result = CliRunner().invoke(main, ["data", "encode", str(tmp_path / "videos"), str(tmp_path / "out"), *sizes])
    assert result.exit_code == 0, result.output
    latents, prompt = LatentStore.open(tmp_path / "out")[0]
    assert (latents.shape, prompt) == ((1, 3, 16, 2, 3), "it brightens")
    video = torch.arange(9)[:, None, None, None].expand(9, 3, 16, 24) * 20 / 255
    torch.testing.assert_close(latents[0], encode(load_vae(vae_folder), video[None])[0], rtol=0, atol=2e-3)  # float16
    result = CliRunner().invoke(main, ["data", "inspect", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.png").stat().st_size > 100
