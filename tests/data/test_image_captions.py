"""Captioned images in the public metadata layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sftk.data.image_captions import ImageCaptions, read_items
from sftk.data.pictures import cover
from sftk.data.sources import source
from sftk.errors import DataError

CODEC = {"use": "pixel_unshuffle", "with": {"factor": 2, "std": 0.5}}


def item(name, **more):
    crop = {"target_bbox": [10, 0, 26, 16], "target_ratio": "26-15"}
    sizes = {"origin_width": 40, "origin_height": 16}
    return {"file_name": name, "caption": "a 3 moving left", "target_crop": crop, "type": "photo"} | sizes | more


@pytest.fixture
def folder(tmp_path):
    """An uncut image whose box is white and the rest black, and one that was cut already."""
    (tmp_path / "26-15").mkdir()
    pixels = np.zeros((16, 40, 3), np.uint8)
    pixels[:, 10:26] = 255
    Image.fromarray(pixels).save(tmp_path / "26-15" / "whole.png")
    Image.fromarray(np.full((32, 32, 3), 127, np.uint8)).save(tmp_path / "26-15" / "cut.png")
    (tmp_path / "target_crop_info_26-15.json").write_text(json.dumps([item("whole.png"), item("cut.png")]))
    return tmp_path


def make(path, **options):
    shape = {"frames": 21, "channels": 12, "height": 4, "width": 4}
    return source("image_captions").build(
        **shape, seed=0, options={"path": str(path), "text": "digits", "codec": CODEC} | options
    )


def test_items(folder):
    (whole, cut) = read_items(folder)
    assert (whole.bbox, whole.ratio, whole.kind, whole.origin) == ((10, 0, 26, 16), "26-15", "photo", (40, 16))
    assert cut.path == folder / "26-15" / "cut.png"
    assert read_items(folder / "target_crop_info_26-15.json") == (whole, cut)


def test_latents(folder):
    data = make(folder)
    assert isinstance(data, ImageCaptions)
    whole, cut = data[0]["initial_latents"], data[1]["initial_latents"]
    assert whole.shape == cut.shape == (1, 12, 4, 4)
    torch.testing.assert_close(whole, torch.full_like(whole, 2.0))
    torch.testing.assert_close(cut, torch.full_like(cut, (2 * 127 / 255 - 1) / 0.5))
    batch = source("image_captions").collate([data[0], data[1]])
    assert batch["initial_latents"].shape == (2, 1, 12, 4, 4)
    assert batch["prompt"] == ["a 3 moving left"] * 2


def test_cover_keeps_the_middle():
    ramp = torch.arange(40.0).expand(1, 1, 10, 40) / 39
    found = cover(ramp, 10, 10)
    torch.testing.assert_close(found[0, 0, 0], ramp[0, 0, 0, 15:25])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no list of items"),
        ('[{"caption": "x"}]', "item 0 has no 'file_name'"),
        ('[{"file_name": "x", "caption": " "}]', "item 0 has no 'caption'"),
        ('[{"file_name": "x", "caption": "y", "target_crop": {"target_bbox": [3, 0, 1, 4]}}]', "target_bbox is"),
    ],
)
def test_wrong_metadata(tmp_path, text, message):
    (tmp_path / "target_crop_info_1-1.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_items(tmp_path)


def test_other_errors(folder, tmp_path):
    (folder / "26-15" / "cut.png").write_bytes((folder / "26-15" / "cut.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot read the image .*26-15/cut.png"):
        make(folder)[1]
    data = make(folder, skip_bad=True)
    assert (len(data), len(data.bad)) == (1, 1)
    assert "26-15/cut.png" in data.bad[0]
    with pytest.raises(DataError, match="the codec makes 4 channels, the recipe's latents have 12"):
        make(folder, codec="digits")
    (folder / "target_crop_info_1-1.json").write_text("[]")
    with pytest.raises(DataError, match=r"has 2 metadata files \(target_crop_info_1-1.json, target_crop_info_26-15.json\)"):
        read_items(folder)
