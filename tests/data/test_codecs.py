"""Codecs: inverses, the embedded task's latents, errors."""

from __future__ import annotations

import pytest
import torch

from sftk.data.codecs import PixelUnshuffle, make_codec
from sftk.data.digits import DigitClips, decode_latents, encode_latents
from sftk.errors import DataError, ShapeError


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_decode_inverts_encode(factor, grey):
    codec = PixelUnshuffle(factor=factor, mean=-0.3, std=0.7, grey=grey)
    video = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    if grey:
        video = video[:, :1].expand(-1, 3, -1, -1)
    latents = codec.encode(video)
    assert latents.shape == (3, codec.channels, 8 // factor, 16 // factor)
    again = codec.decode(latents[None])[0]
    torch.testing.assert_close(again, video[:, 0] if grey else video, rtol=0, atol=1e-6)


def test_the_codec_of_the_embedded_task():
    latents = DigitClips("test", frames=4)[3]["latents"][None]
    codec, pictures = make_codec("digits"), decode_latents(latents)
    torch.testing.assert_close(codec.encode(pictures[0][:, None].expand(-1, 3, -1, -1)), encode_latents(pictures)[0])
    torch.testing.assert_close(codec.decode(latents), pictures)


def test_numbers():
    latents = PixelUnshuffle(factor=1, mean=0.5, std=2.0).encode(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1))
    assert latents.flatten().tolist() == [-0.75, -0.25, 0.25]


def test_errors():
    with pytest.raises(ShapeError, match=r"\[2, 3, 9, 8\]; expected \[F, 3, H, W\] with sides that 2 divides"):
        PixelUnshuffle().encode(torch.zeros(2, 3, 9, 8))
    with pytest.raises(ShapeError, match=r"expected \[B, F, 12, h, w\]"):
        PixelUnshuffle().decode(torch.zeros(1, 2, 4, 8, 8))
    with pytest.raises(DataError, match=r"unknown codec 'pixel_unshufle'; did you mean 'pixel_unshuffle'\?"):
        make_codec("pixel_unshufle")
    with pytest.raises(DataError, match="std above 0"):
        make_codec({"use": "pixel_unshuffle", "with": {"std": 0.0}})
    with pytest.raises(
        DataError, match=r"the option 'factor' of pixel_unshuffle takes an integer, found the string '2' @ with"
    ):
        make_codec({"use": "pixel_unshuffle", "with": {"factor": "2"}})
