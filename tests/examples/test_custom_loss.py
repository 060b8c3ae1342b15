"""examples/custom_loss.py: ten steps from Python and from YAML, in a process of its own and as a plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sftk import Graph
from sftk.errors import SpecError
from sftk.spec.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_both_ways_end_at_the_same_loss(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "custom_loss.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.partition(":")[2] for line in done.stdout.splitlines() if line.startswith("from ")]
    mine, theirs = (json.loads(line) for line in lines)
    assert (mine.pop("stage"), theirs.pop("stage")) == ("recipe", "custom_loss")
    assert mine == theirs
    assert mine["step"] == 10
    assert list(tmp_path.iterdir()) == []


RECIPE = {
    "version": 1,
    "latents": {"frames": 6, "channels": 4, "height": 8, "width": 8},
    "data": {"use": "digits", "with": {"split": "train"}},
    "models": {"denoiser": {"size": "digits"}},
    "optimizers": {"denoiser": {"lr": 1e-4}},
    "phases": [{"name": "flow", "update": "denoiser"}],
    "train": {"steps": 1},
    "batch": {"global": 2},
}


def test_a_phase_without_a_graph_says_how_to_give_one():
    with pytest.raises(SpecError) as caught:
        load_recipe(RECIPE)
    assert "the phase 'flow' has no graph @ $.phases[0] (recipe)" in str(caught.value.problems[0])
    assert "graphs={'flow': Graph(...)}" in str(caught.value.problems[0])


def test_a_graph_from_python_is_checked_like_one_from_a_file():
    graph = Graph.from_spec("specs/flow_matching.yaml")
    (stage,) = load_recipe(RECIPE, ["train.steps=3"], graphs={"flow": graph})
    assert stage.graphs["flow"] is graph
    assert stage.recipe.train.steps == 3
    other = Graph.from_spec("specs/ode_regression.yaml")
    with pytest.raises(SpecError) as caught:
        load_recipe(RECIPE, graphs={"flow": other})
    said = "\n".join(map(str, caught.value.problems))
    assert "'ode_latents'" in said
    assert "'generator'" in said


def test_a_recipe_from_python_is_read_as_strictly_as_one_from_a_file():
    with pytest.raises(SpecError) as caught:
        load_recipe(RECIPE | {"seed": "1", "sede": 2})
    said = [str(problem) for problem in caught.value.problems]
    assert any('expected an integer, found the string "1" @ $.seed (recipe)' in line for line in said), said
    assert any("unknown key 'sede'" in line for line in said), said
