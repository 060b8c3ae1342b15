"""What may change in mid-run and what may not, and how the first difference is said."""

from __future__ import annotations

import functools

import pytest

from sftk.spec.fingerprint import fingerprint, first_difference, recipe_hash
from sftk.spec.recipe import load_recipe


@pytest.mark.parametrize(
    ("was", "now", "found"),
    [
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.0}]}, None),
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 3.0}]}, "$.a[1].b was 2.0 and is 3.0"),
        ({"a": [1]}, {"a": [1, 2]}, "$.a was [1] and is [1, 2]"),
        ({"a": "x"}, {}, '$.a was "x" and is null'),
        ({}, {"b": True}, "$.b was null and is true"),
    ],
)
def test_difference(was, now, found):
    assert first_difference(was, now) == found


@functools.cache
def found(*overrides):
    (stage,) = load_recipe("recipes/dmd.yaml", overrides)
    return fingerprint(stage)


MAY = ("batch.per_rank=4", "doc=x", "data.workers=2", "checkpoint.every=3", "models.generator.weights=null", "compile=true")


def test_what_may_change():
    assert first_difference(found(), found(*MAY)) is None
    assert recipe_hash(found()) == recipe_hash(found(*MAY))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1", "$.seed was 0 and is 1"),
        ("batch.global=8", "$.batch.global was 16 and is 8"),
        ("train.steps=60", "$.train.steps was 50 and is 60"),
        ("phases.critic.every=5", "$.phases[1].every was 1 and is 5"),
        ("models.real_score.weights=null", '$.models.real_score.weights was "assets/digits/teacher.safetensors" and is null'),
        ("data.with.split=test", '$.data.with.split was "train" and is "test"'),
    ],
)
def test_what_may_not(override, said):
    changed = found(override)
    assert first_difference(found(), changed) == said
    assert recipe_hash(found()) != recipe_hash(changed)


def test_an_option_of_a_graph():
    said = first_difference(found(), found("phases.generator.with.guidance=3.5"))
    assert said is not None
    assert said.startswith('$.phases[0].graph[24] was "predict_x0_cfg(')
    assert said.index("scale: 2.5") < said.index(" and is ") < said.index("scale: 3.5")


def test_steps_matter_only_to_a_schedule():
    constant = "optimizers.generator.schedule=constant"
    assert first_difference(found(constant), found(constant, "train.steps=60")) is None
