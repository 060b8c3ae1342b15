"""A trained student from a run: its newest checkpoint, its average, the way of sampling that the run says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sftk.errors import CheckpointError
from sftk.runtime.inference import load_student


@pytest.fixture
def run(tiny, train):
    return train(tiny(), "train.steps=2", "checkpoint.every=1", "ema.generator.start=0")


def test_the_average_of_the_newest_checkpoint(run):
    student = load_student(run.root)
    newest = run.checkpoints("tiny") / "step_00000002"
    assert student.weights == newest / "generator.ema.safetensors"
    assert student.sampling.steps == (1000, 500)
    assert student.sampling.shift == 3.0
    assert student.shape == (6, 4, 8, 8)
    wanted = load_file(student.weights)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in student.port.module.state_dict().items())


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
    assert load_student(run.root / where, role=role).weights == run.checkpoints("tiny") / file


def test_videos(run):
    student = load_student(run.root)
    prompts = ["a 3 moving left", "a 5 moving up"]
    video = student.sample(prompts, frames=9, seed=3)
    assert video.shape == (2, 9, 16, 16)
    assert 0 <= video.min() < video.max() <= 1
    assert torch.equal(student.sample(prompts, frames=9, seed=3), video)
    assert not torch.equal(student.sample(prompts, frames=9, seed=4), video)


@pytest.mark.usefixtures("temporary_transforms")
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
    assert load_student(made.root).sampling.steps == (1000, 500)


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_student(run.root / "checkpoints" / "nothing")
    with pytest.raises(CheckpointError, match=r"no recipe.yaml above it"):
        load_student(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights of 'generatr'.*did you mean 'generator'\?"):
        load_student(run.root, role="generatr")
    broken = run.checkpoints("tiny") / "step_00000002" / "generator.ema.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_student(run.root)
