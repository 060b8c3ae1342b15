"""`sftk sample` on the shipped digits models: files of every kind, read back; what videos begin with; what is printed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sftk.cli import main
from sftk.data.codecs import digits_codec
from sftk.models.weights import save_weights
from sftk.runtime import streaming

LEFT = ("--prompt", "a 3 moving left")
SHORT = ("--frames", "6", "sampling.steps=[1000, 500]")


def sample(*arguments):
    result = CliRunner().invoke(main, ["sample", "recipes/dmd.yaml", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def pictures(path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="gray") for frame in video.decode(video=0)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A video and its latents, and what was printed as JSON."""
    out = tmp_path_factory.mktemp("made") / "a.mp4"
    return out, json.loads(sample(*LEFT, *SHORT, "--out", out, "--latents", "--json", "--seed", 5))


def test_a_video_its_latents_and_what_they_took(made):
    out, said = made
    latents = load_file(out.with_suffix(".safetensors"))["latents"]
    assert (latents.shape, latents.dtype) == ((6, 4, 8, 8), torch.float32)
    decoded = digits_codec().decode(latents[None])[0].numpy() * 255
    shown = pictures(out)[:, 8::16, 8::16]
    assert shown.shape == (6, 16, 16)
    assert np.abs(shown - decoded).mean() < 4
    with safe_open(out.with_suffix(".safetensors"), "pt") as file:
        about = file.metadata()
    assert (about["prompt"], about["seed"], about["fps"]) == ("a 3 moving left", "5", "8.0")
    assert json.loads(about["sampling"])["steps"] == [1000, 500]
    (video,) = said["videos"]
    assert video == {
        "file": str(out), "latents": str(out.with_suffix(".safetensors")), "prompt": "a 3 moving left", "seed": 5, "frames": 6,
    }  # fmt: skip
    spent, part = video["frames"] / said["frames_per_second"], said["seconds"]
    assert 0 < said["first_block_latency"] < spent < part["sample"] + 0.001, "a part is rounded to milliseconds"
    assert part["total"] == pytest.approx(sum(part.values()) - part["total"], abs=0.0005 * len(part))
    assert said["peak_memory_bytes"]["total"] > 10**7
    with av.open(str(out)) as file:
        assert file.streams.video[0].average_rate == 8


def test_speed_is_that_of_all_videos_and_latency_that_of_the_first_block(tmp_path, monkeypatch):
    """By a clock that counts a second for each block; what is done between two blocks does not count."""
    monkeypatch.setattr(streaming, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    out = ("--out", tmp_path / "v.safetensors")
    said = json.loads(sample(*LEFT * 3, *SHORT, *out, "--batch", 2, "--json"))
    batches, blocks = 2, 2
    assert (said["first_block_latency"], said["frames_per_second"]) == (1, 3 * 6 / (batches * blocks))


def test_the_line_at_the_end(tmp_path):
    printed = sample(*LEFT, *SHORT, "--out", tmp_path / "a.gif", "fps=20").splitlines()
    assert printed[0].startswith(f"{tmp_path}/a.gif: a 3 moving left (6 frames, seed 0, ")
    assert "first frames after" in printed[1]
    assert "frames a second, peak memory" in printed[1]
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 50


def test_prompt_files_seeds_and_batches(tmp_path):
    (tmp_path / "prompts.txt").write_text("# two\n\na 3 moving left\n  an 8 moving up\n")
    (tmp_path / "longer.txt").write_text("a 5 moving right\na 6 moving down\n")
    files = ("--prompts", tmp_path / "prompts.txt")
    out = ("--out", tmp_path / "v.safetensors")
    said = json.loads(sample(*files, *SHORT, *out, "--batch", 2, "--seed", 9, "--seed", 4, "--json"))
    assert [(video["prompt"], video["seed"]) for video in said["videos"]] == [("a 3 moving left", 9), ("an 8 moving up", 4)]
    both = [load_file(tmp_path / f"v_{index}.safetensors")["latents"] for index in (0, 1)]
    sample("--prompt", "an 8 moving up", *SHORT, "--seed", 4, "--out", tmp_path / "one.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "one.safetensors")["latents"], both[1], rtol=1e-5, atol=1e-5)
    said = json.loads(sample(*files, "--extended", tmp_path / "longer.txt", *SHORT, *out, "--seed", 4, "--json"))
    assert [(video["prompt"], video["seed"]) for video in said["videos"]] == [("a 3 moving left", 4), ("an 8 moving up", 5)]
    sample("--prompt", "a 5 moving right", *SHORT, "--seed", 4, "--out", tmp_path / "five.safetensors")
    longer, five = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("v_0", "five"))
    torch.testing.assert_close(longer, five, rtol=1e-5, atol=1e-5)
    sample(*LEFT, *SHORT, "--seed", 1, "--seed", 2, "--out", tmp_path / "s.png")
    assert {path.name for path in tmp_path.glob("s*.png")} == {"s_0.png", "s_1.png"}


def test_the_teacher_with_another_solver(tmp_path):
    pytest.importorskip("diffusers")
    solver = ("sampling.solver=unipc", "sampling.steps=3", "--frames", 6)
    said = json.loads(sample(*LEFT, *solver, "--role", "real_score", "--out", tmp_path / "t.gif", "--json"))
    assert said["sampling"]["method"] == "bidirectional_ode"
    assert said["weights"].endswith("teacher.safetensors")
    with Image.open(tmp_path / "t.gif") as gif:
        assert gif.n_frames == 6


def test_it_goes_on_from_latents_and_videos(made, tmp_path):
    out, _ = made
    given = load_file(out.with_suffix(".safetensors"))["latents"]
    more = ("--out", tmp_path / "b.safetensors", "--json")
    found = json.loads(sample(*LEFT, *SHORT, "--initial", out.with_suffix(".safetensors"), *more))
    assert found["videos"][0]["frames"] == 12
    assert torch.equal(load_file(tmp_path / "b.safetensors")["latents"][:6], given)
    sample(*LEFT, *SHORT, "--initial", out.with_suffix(".safetensors"), "--keep", 3, *more)
    assert torch.equal(load_file(tmp_path / "b.safetensors")["latents"][:3], given[3:])
    sample(*LEFT, *SHORT, "--video", out, *more)
    latents = load_file(tmp_path / "b.safetensors")["latents"]
    assert latents.shape[0] == 12
    assert (digits_codec().decode(latents[None, :6]) - digits_codec().decode(given[None])).abs().mean() < 0.03
    sample(*LEFT, *SHORT, "--video", out, "--keep", 3, *more)
    assert (load_file(tmp_path / "b.safetensors")["latents"][:3] - latents[3:6]).abs().mean() < 0.1


def test_it_begins_with_pictures(tmp_path):
    for name, value in (("dark", 0), ("bright", 200)):
        Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    dark, bright = ("--image", tmp_path / "dark.png"), ("--image", tmp_path / "bright.png")
    two = (*LEFT, "--prompt", "an 8 moving up", *SHORT, "--out", tmp_path / "i.safetensors")
    sample(*two, *dark, *bright, "--batch", 2)
    first = [load_file(tmp_path / f"i_{index}.safetensors")["latents"] for index in (0, 1)]
    assert [latents.shape[0] for latents in first] == [7, 7]
    shown = [digits_codec().decode(latents[None])[0, 0] for latents in first]
    assert [round(picture.mean().item() * 255) for picture in shown] == [0, 200]
    sample(*two, *bright)
    assert torch.equal(load_file(tmp_path / "i_0.safetensors")["latents"][0], first[1][0])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "a.avi"), 1, "cannot write 'a.avi'; expected a name that ends in .gif, .mp4, .png, .safetensors"),
        (("--seed", "1", "--seed", "2", "--prompt", "a 5 moving up", "--prompt", "a 6 moving up"), 1, "2 seeds for 3 videos"),
        (("--image", "x.png", "--video", "x.mp4"), 2, "each say what videos begin with; give one of them"),
        (("--keep", "3"), 2, "--keep is for --video and --initial"),
        (("--image", "x.png"), 1, "cannot read the image x.png"),
        (("--initial", "x.safetensors"), 1, "cannot read the latents x.safetensors"),
        (("--initial", "other.safetensors"), 1, "other.safetensors holds weight; expected 'latents', as --latents writes it"),
        (
            ("--initial", "wide.safetensors"),
            1,
            "wide.safetensors holds latents of [3, 4, 8, 9], the recipe says [4, 8, 8] (channels, height, width); set latents: "
            "{channels: 4, height: 8, width: 9} in the recipe, or name a file of that size",
        ),
        (("--initial", "wide.safetensors", "--keep", "9"), 1, "wide.safetensors has 3 latent frames, expected at least 9"),
        (("--video", "x.mp4"), 1, "cannot decode the video x.mp4"),
        (("--frames", "7"), 1, "7 frames do not divide into blocks of 3; take 6 or 9 frames"),
        (("sampling.window=2",), 2, "@ $.sampling.window (override 'sampling.window=2')"),
        (("--role", "real_scor"), 1, "'real_scor' is not a backbone of"),
        (("text={use: umt5, with: {path: nowhere}}",), 2, "no such file 'nowhere' @ $.text.with.path; looked in"),
        (("text={use: umt5, with: {path: .}}",), 1, "no text encoder at"),
        (("--prompts", "nowhere.txt"), 1, "cannot read the prompt file nowhere.txt"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    save_file({"weight": torch.zeros(1)}, "other.safetensors")
    save_file({"latents": torch.zeros(3, 4, 8, 9)}, "wide.safetensors")
    result = CliRunner().invoke(main, ["sample", "recipes/dmd.yaml", *LEFT, "--out", "a.gif", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert message in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"other.safetensors", "wide.safetensors"}


WAN = """\
version: 1
latents: {frames: 6, channels: 16, height: 4, width: 6}
data: {use: random, with: {text_dim: 16}}
models: {generator: {size: auto, weights: download}}
optimizers: {generator: {lr: 1e-3}}
phases: [{name: df, update: generator, models: {denoiser: generator}, graph: specs/diffusion_forcing.yaml}]
train: {steps: 1}
batch: {global: 1}
precision: bf16
sample:
  text: {use: umt5, with: {path: download, text_dim: 16}}
  codec: {use: wan_vae, with: {path: download}}
  roles: {generator: {steps: [1000, 500], window: 6}}
"""


def test_a_wan_download(make_model, text_folders, tmp_path, monkeypatch):
    """A folder as Wan publishes it: backbone, UMT5 and tokenizer (and diffusers' VAE); pictures out, one to begin with."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text_folders / "wan", "download")
    sizes = {"dim": 256, "num_heads": 2, "in_dim": 16, "out_dim": 16, "text_dim": 16, "text_len": 512}
    save_weights(make_model(torch.float32, **sizes), tmp_path / "m.safetensors")
    assert CliRunner().invoke(main, ["export", "m.safetensors", "out", "--format", "original"]).exit_code == 0
    for path in Path("out").iterdir():
        shutil.copy(path, "download")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.AutoencoderKLWan(base_dim=4).save_pretrained("download/vae")
    Path("wan.yaml").write_text(WAN)
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save("grey.png")
    runner = CliRunner()
    arguments = ["sample", "wan.yaml", "--prompt", "a fox runs", "--image", "grey.png", "--out", "a.mp4", "--latents", "--json"]
    result = runner.invoke(main, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, (result.output, result.exception)
    said = json.loads(result.output)
    assert said["videos"][0]["frames"] == 1 + 4 * 6
    assert said["seconds"].keys() == {"text", "load", "encode", "sample", "total"}
    with av.open("a.mp4") as video:
        assert video.streams.video[0].average_rate == 16
        assert sum(1 for _ in video.decode(video=0)) == 25
    assert load_file("a.safetensors")["latents"].shape == (7, 16, 4, 6)
    (tmp_path / "download" / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    result = runner.invoke(main, arguments)
    assert result.exit_code == 1
    assert "missing tokenizer: none of" in result.output


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    """Everything small, in a process of its own."""
    pytest.importorskip("diffusers")
    script = Path(__file__).parents[2] / "benchmarks" / "sample_1.3b.py"
    sizes = ["--tiny", "--device", "cpu", "--runs", "1", "--frames", "3", "--latents", "precision=fp32"]
    done = subprocess.run(
        [sys.executable, str(script), *sizes, "--out", "a.mp4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["videos"][0]["frames"] == 9
    assert said["first_block_latency"] > 0
    assert load_file(tmp_path / "a.safetensors")["latents"].isfinite().all()
    assert len(pictures(tmp_path / "a.mp4")) == 9
