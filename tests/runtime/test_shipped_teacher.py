"""The teacher's figures that ship with the package serve the default recipe, which has no minutes for fifty steps of it."""

from __future__ import annotations

import attrs
import pytest

from sftk.runtime.evaluate import DigitsEvaluation, shipped_teacher
from sftk.spec.convert import structure
from sftk.spec.document import Document
from sftk.spec.files import find_file
from sftk.spec.recipe import load_recipe

RECIPE = "recipes/dmd.yaml"


@pytest.fixture
def default():
    stage = load_recipe(RECIPE)[-1]
    options = structure(Document(value=stage.recipe.eval.with_, file=RECIPE), DigitsEvaluation)
    return find_file(stage.recipe.models["real_score"].weights, stage.path), options


def test_they_serve_the_default_recipe(default):
    row, clips = shipped_teacher(*default)
    assert clips == default[1].clips
    assert row["direction_accuracy"] >= 0.98


@pytest.mark.parametrize("change", [{"steps": 49}, {"guidance": 3.0}, {"solver": "unipc"}, {"average": True}])
def test_they_are_of_no_other_sampling(default, change):
    weights, options = default
    other = attrs.evolve(options, teacher_sampling=attrs.evolve(options.teacher_sampling, **change))
    assert shipped_teacher(weights, other) is None


def test_how_passes_are_batched_does_not_matter(default):
    weights, options = default
    other = attrs.evolve(options, teacher_sampling=attrs.evolve(options.teacher_sampling, guidance_batch=True))
    assert shipped_teacher(weights, other) is not None


def test_they_are_of_no_other_weights(default, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"other")
    assert shipped_teacher(tmp_path / "other.safetensors", default[1]) is None
