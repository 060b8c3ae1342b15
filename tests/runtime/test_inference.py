"""A sampler of a run or a recipe: its newest checkpoint, its average, the way of sampling that it says, overrides."""

from __future__ import annotations

import attrs
import pytest
import torch
from safetensors.torch import load_file

from sftk.errors import CheckpointError, DataError, SftkError, SpecError
from sftk.runtime.inference import load_sampler


@pytest.fixture
def run(tiny, train):
    return train(tiny(), "train.steps=2", "checkpoint.every=1", "ema.generator.start=0")


def test_the_average_of_the_newest_checkpoint(run):
    sampler = load_sampler(run.root)
    newest = run.checkpoints("tiny") / "step_00000002"
    assert sampler.weights == newest / "generator.ema.safetensors"
    assert sampler.options.sampling.steps == (1000, 500)
    assert sampler.options.sampling.shift == 3.0
    assert attrs.astuple(sampler.options.latents) == (6, 4, 8, 8)
    wanted = load_file(sampler.weights)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in sampler.port.module.state_dict().items())


@pytest.mark.parametrize(
    ("where", "role", "file"),
    [
        ("", "fake_score", "step_00000002/fake_score.safetensors"),
        ("checkpoints/tiny", None, "step_00000002/generator.ema.safetensors"),
        ("checkpoints/tiny/step_00000001", None, "step_00000001/generator.ema.safetensors"),
        ("checkpoints/tiny/step_00000001/generator.safetensors", None, "step_00000001/generator.safetensors"),
    ],
)
def test_places(run, where, role, file):
    assert load_sampler(run.root / where, role=role).weights == run.checkpoints("tiny") / file


def test_videos(run):
    sampler = load_sampler(run.root)
    prompts = ["a 3 moving left", "a 5 moving up"]
    video = sampler.sample(prompts, frames=9, seeds=3)
    assert video.shape == (2, 9, 16, 16)
    assert 0 <= video.min() < video.max() <= 1
    assert torch.equal(sampler.sample(prompts, frames=9, seeds=3), video)
    assert not torch.equal(sampler.sample(prompts, frames=9, seeds=4), video)


@pytest.mark.usefixtures("nothing_stays_registered")
def test_a_plugin_and_a_graph_beside_the_recipe(tiny, train, tmp_path, monkeypatch):
    from sftk.spec.files import package_root

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "critic.yaml").write_text((package_root() / "specs" / "score_critic.yaml").read_text())
    (tmp_path / "own" / "plugin.py").write_text("LOADED = True\n")
    recipe = tmp_path / "own" / "own.yaml"
    text = tiny().read_text().replace("specs/score_critic.yaml", "critic.yaml")
    recipe.write_text(text.replace("version: 1", "version: 1\nplugins: [plugin.py]"))
    made = train(recipe, "train.steps=1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_sampler(made.root).options.sampling.steps == (1000, 500)


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_sampler(run.root / "checkpoints" / "nothing")
    with pytest.raises(CheckpointError, match=r"no recipe.yaml above it"):
        load_sampler(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights of 'generatr'.*did you mean 'generator'\?"):
        load_sampler(run.root, role="generatr")
    broken = run.checkpoints("tiny") / "step_00000002" / "generator.ema.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        _ = load_sampler(run.root).port


def test_a_recipe_with_its_own_weights_and_roles(tiny):
    recipe = tiny()
    assert load_sampler(recipe).weights.name == "student.safetensors"
    assert load_sampler(recipe, role="real_score").weights.name == "teacher.safetensors"
    section = (
        "sample: {roles: {fake_score: {method: causal_ode, steps: 3}, generator: {window: 3}}, fps: 5, negative: a 1 moving up}"
    )
    recipe = tiny("device: cpu", f"device: cpu\nprecision: bf16\n{section}")
    sampler = load_sampler(recipe, ["sampling.steps=2", "precision=fp32"])
    assert sampler.weights.name == "critic.safetensors"
    options = sampler.options
    assert (options.sampling.method, options.sampling.steps, options.fps, options.negative) == (
        "causal_ode",
        2,
        5,
        "a 1 moving up",
    )
    assert (options.precision, next(sampler.port.module.parameters()).dtype) == ("fp32", torch.float32)
    half = load_sampler(recipe, role="generator")
    assert (half.options.sampling.window, half.port.dtype) == (3, torch.bfloat16)
    assert {one.dtype for one in half.port.module.parameters()} == {torch.bfloat16}
    assert half.sample(["a 3 moving left"]).isfinite().all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.windw=3", r"unknown key 'windw' @ \$.sampling \(override 'sampling.windw=3'\); did you mean 'window'\?"),
        ("sampling.steps=[250, 500]", r"steps must descend.* @ \$.sampling.steps \(override 'sampling.steps=\[250, 500\]'\)"),
        ("sampling.method=causal", r"found the string \"causal\" @ \$.sampling.method"),
        ("sampling.window=3.5", r"expected an integer.* @ \$.sampling.window"),
        ("sampler.window=3", r"unknown key 'sampler' @ \$ .*; did you mean 'sampling'\?"),
        ("fps=0", r"greater than 0, found 0.* @ \$.fps"),
        ("sampling.window", r"expected key.path=value, found no '='"),
    ],
)
def test_overrides_are_checked(tiny, override, message):
    with pytest.raises(SpecError, match=message):
        load_sampler(tiny(), [override])


def test_another_method_keeps_what_both_have(tiny):
    sampling = load_sampler(tiny(), ["sampling.method=causal_ode", "sampling.guidance=2.0"]).options.sampling
    assert (sampling.method, sampling.steps, sampling.shift, sampling.guidance) == ("causal_ode", 50, 3.0, 2.0)


def test_what_a_recipe_does_not_say_is_named(tiny):
    silent = ("{use: digits, with: {split: train, size: 7}}", "{use: random, with: {text_len: 4, text_dim: 32}}")
    with pytest.raises(SftkError, match="nothing says how latents become pictures; name a codec"):
        load_sampler(tiny(*silent)).sample(["a fox"])
    with pytest.raises(SftkError, match="nothing says how prompts are embedded; name an embedder"):
        load_sampler(tiny(*silent)).sample(["a fox"], decode=False)
    spoken = load_sampler(tiny(*silent), ["text=digits", "codec=digits"])
    assert spoken.sample(["a 3 moving left"]).shape == (1, 6, 16, 16)
    with pytest.raises(CheckpointError, match="names no weights of 'generator'; name some with --weights"):
        load_sampler(tiny(", weights: FOLDER/student.safetensors", ""))
    with pytest.raises(CheckpointError, match=r"'generater' is not a backbone of .*did you mean 'generator'"):
        load_sampler(tiny(), role="generater")
    with pytest.raises(DataError, match="the codec makes 48 channels, the recipe's latents have 4"):
        load_sampler(tiny(), ["codec={use: pixel_unshuffle, with: {factor: 4}}"])
