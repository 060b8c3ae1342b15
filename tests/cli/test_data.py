"""`sftk data`: what the commands print, write and return."""

from __future__ import annotations

import json
import re
import shlex

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sftk.cli import main
from sftk.data.lmdb_store import LatentStore, write_store
from sftk.spec.files import package_root


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write_video(path, count=21):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for index in range(count):
            image = np.full((32, 48, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_the_commands_of_the_documentation(tmp_path, monkeypatch, text_folders):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for digit in range(3):
        write_video(tmp_path / "videos" / f"{digit}.mp4")
        (tmp_path / "videos" / f"{digit}.txt").write_text(f"a {digit} moving left")
    page = (package_root() / "docs" / "data.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
    assert [command.split()[2] for command in commands] == ["encode", "inspect", "embed"]
    # The small encoder in the place of the real one.
    (tmp_path / "wan_models").mkdir()
    (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B").symlink_to(text_folders / "wan")
    (tmp_path / "prompts.txt").write_text("a red fox\na hare\n")
    commands[2] = commands[2].replace("}}", ", text_len: 24, text_dim: 16}}")
    outputs = []
    for command in commands:
        result = invoke(*shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    assert "data/clips: 3 clips written, 0 videos were there already, 0 left out" in outputs[0]
    assert "data/clips: 3 records in 1 environment" in outputs[1]
    assert "latents [21, 4, 8, 8]" in outputs[1]
    assert "  1: a 1 moving left" in outputs[1]
    assert "data/embeds: 3 prompts embedded, 0 were there already" in outputs[2]
    with Image.open(tmp_path / "data" / "clips.png") as sheet:
        assert sheet.size[0] > 11 * 64
        assert sheet.size[1] > 3 * 64


def test_encode_lists_what_it_leaves_out(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "good.mp4")
    write_video(tmp_path / "videos" / "short.mp4", count=3)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"x" * 100)
    lines = [json.dumps({"file_name": f"{name}.mp4", "caption": name}) for name in ("good", "short", "broken")]
    (tmp_path / "videos" / "captions.jsonl").write_text("\n".join(lines))
    codec = "{use: pixel_unshuffle, with: {factor: 8}}"
    line = ("data", "encode", tmp_path / "videos", tmp_path / "out", "--codec", codec, "--frames", 21, "--size", "32x48")
    result = invoke(*line)
    assert result.exit_code == 1
    assert re.search(
        r"error: cannot decode the video .*broken.mp4: Invalid data[^;]*; .* with --skip-bad$", result.output.strip()
    )
    assert "it holds videos, which `sftk data encode`" in invoke("data", "inspect", tmp_path / "videos").output
    result = invoke(*line, "--skip-bad")
    assert result.exit_code == 0, result.output
    assert re.search(r"left out: cannot decode the video .*broken.mp4", result.output)
    assert re.search(r"left out: .*short.mp4 has 3 frames, expected at least 21", result.output)
    assert "1 clips written, 0 videos were there already, 2 left out" in result.output
    assert LatentStore.open(tmp_path / "out").shape == (1, 21, 192, 4, 6)
    shown = invoke("data", "inspect", tmp_path / "out").output
    assert "every_clip: false\nfps: null\nframes: 21\n" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--codec", "digits", "--size", "16"), 2, "expected HEIGHTxWIDTH in pixels, such as 480x832, found '16'"),
        (("--codec", "digitz", "--size", "16x16"), 1, "unknown codec 'digitz'; did you mean 'digits'?"),
        (("--codec", "{use: ", "--size", "16x16"), 2, "--codec"),
    ],
)
def test_wrong_options(tmp_path, arguments, code, message):
    result = invoke("data", "encode", tmp_path, tmp_path / "out", "--frames", 3, *arguments)
    assert result.exit_code == code
    assert message in result.output


def test_inspect_pairs_prompts_and_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [(torch.randn(5, 3, 16, 8, 12), f"prompt {i}") for i in range(4)]
    write_store(tmp_path / "pairs", pairs, shards=2)
    result = invoke("data", "inspect", "pairs", "--out", "a.png", "--rows", 2)
    assert result.exit_code == 0, result.output
    assert "4 records in 2 environments" in result.output
    assert "latents [3, 16, 8, 12] (frames, channels, height, width), 5 states each" in result.output
    with Image.open("a.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.std() > 10
    (tmp_path / "p.txt").write_text("one\n# no\ntwo\n")
    assert invoke("data", "inspect", "p.txt").output.splitlines() == ["p.txt: 2 prompts", "  0: one", "  1: two"]
    (tmp_path / "i" / "1-1").mkdir(parents=True)
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "i" / "1-1" / "x.png")
    (tmp_path / "i" / "target_crop_info_1-1.json").write_text('[{"file_name": "x.png", "caption": "red", "type": "photo"}]')
    result = invoke("data", "inspect", "i")
    assert "i: 1 captioned images (photo)" in result.output
    with Image.open("i.png") as sheet:
        assert (np.asarray(sheet) == (255, 0, 0)).all(-1).sum() > 10_000


def test_inspect_errors(tmp_path):
    for name, message in (
        ("none", "no such file or folder"),
        (".", "is no store, no prompt file and no folder of captioned images"),
    ):
        result = invoke("data", "inspect", tmp_path / name)
        assert result.exit_code == 1
        assert message in result.output
    (tmp_path / "empty.txt").touch()
    assert "holds no prompt" in invoke("data", "inspect", tmp_path / "empty.txt").output


def test_inspect_skips_what_is_bad(tmp_path):
    write_store(tmp_path / "s" / "a", [(torch.zeros(3, 4, 8, 8), "x")])
    write_store(tmp_path / "s" / "b", [(torch.zeros(6, 4, 8, 8), "y")])
    assert invoke("data", "inspect", tmp_path / "s").exit_code == 1
    result = invoke("data", "inspect", tmp_path / "s", "--skip-bad")
    assert result.exit_code == 0
    assert re.search(r"left out: .*s/b holds records of \[6, 4, 8, 8\]", result.output)
    assert "1 left out" in result.output
