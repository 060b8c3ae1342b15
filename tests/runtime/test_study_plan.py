"""The plan of a study: what an earlier command left, and where a folder holds another recipe."""

from __future__ import annotations

import json

import pytest

from sftk.errors import SftkError
from sftk.runtime.study_plan import plan_runs
from sftk.spec.study import load_study

MATRIX = """\
version: 1
seeds: [0, 1]
matrix:
  - {name: one, recipe: tiny.yaml}
  - {name: two, recipe: tiny.yaml, with: {models.generator.weights: one/generator}}
  - {name: three, recipe: tiny.yaml, with: {models.real_score.weights: two/fake_score}, seeds: [1]}
"""


@pytest.fixture
def plan(tiny, tmp_path, monkeypatch):
    """`plan(*overrides, text=MATRIX)`: the runs of the study in tmp_path/study."""
    monkeypatch.chdir(tmp_path)
    tiny()

    def make(*overrides, text=MATRIX):
        (tmp_path / "all.yaml").write_text(text)
        return plan_runs(load_study("all.yaml", overrides), tmp_path / "study")

    return make


def leave(run, *, done=True):
    """What a run of it would leave behind."""
    stage = run.row.stage
    run.folder.root.mkdir(parents=True)
    text = stage.text.replace(f"seed: {stage.resolved['seed']}\n", f"seed: {run.seed}\n")
    for source in ("one/generator", "two/fake_score"):
        text = text.replace(f"weights: {source}\n", "weights: /some/where/step_4/weights.safetensors\n")
    run.folder.recipe.write_text(text)
    if done:
        run.folder.write("summary.json", {"seconds": {}})


def test_order_needs_and_folders(plan, tmp_path):
    runs = plan()
    assert list(runs) == [("one", 0), ("one", 1), ("two", 0), ("two", 1), ("three", 1)]
    assert runs["two", 1].needs == {"generator": ("one", 1, "generator")}
    assert runs["three", 1].needs == {"real_score": ("two", 1, "fake_score")}
    assert runs["two", 0].folder.root == tmp_path / "study" / "runs" / "two" / "seed_0"
    alone = plan(text=MATRIX.replace("recipe: tiny.yaml}", "recipe: tiny.yaml, seeds: [7]}", 1))
    assert alone["two", 1].needs == {"generator": ("one", 7, "generator")}


def test_what_ended_is_done_and_what_did_not_waits(plan):
    runs = plan()
    leave(runs["one", 0])
    leave(runs["two", 1])
    leave(runs["one", 1], done=False)
    assert [run.state for run in plan().values()] == ["done", "waiting", "waiting", "done", "waiting"]


def test_another_recipe_is_an_error_that_says_where(plan):
    leave(plan()["two", 0])
    with pytest.raises(SftkError, match=r"two/seed_0 holds a run of another recipe: \$.train.steps was 4 and is 9; remove"):
        plan("two.train.steps=9")
    assert plan("one.train.steps=9")["two", 0].state == "done"


def test_another_evaluation_alone_is_made_again(plan):
    run = plan()["one", 0]
    leave(run)
    run.folder.write("student_before.json", {})
    assert plan("eval={use: digits, with: {student: generator, clips: 3}}")["one", 0].state == "waiting"
    assert not run.folder.summary.exists()
    assert run.folder.read("student_before.json") is None


def test_step_is_that_of_the_last_whole_line(plan):
    run = plan()["one", 0]
    assert run.step() is None
    run.folder.root.mkdir(parents=True)
    lines = [json.dumps({"stage": "tiny", "step": step, "critic/loss": 0.5}) for step in range(1, 700)]
    run.folder.metrics.write_text("\n".join(lines) + '\n{"stage": "tiny", "st')
    assert run.step() == 699
    run.folder.metrics.write_text('{"stage": "tiny", "st')
    assert run.step() is None
