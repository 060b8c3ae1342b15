"""Studies: whose overrides go where, seeds, and weights that rows hand to later ones."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.errors import SpecError
from sftk.spec.dump import dump_yaml
from sftk.spec.recipe import load_recipe
from sftk.spec.study import load_study

STUDY = """\
version: 1
doc: Two methods.
seeds: [0, 1]
with: {train.steps: 5, batch.global: 4}
matrix:
  - {name: tf, recipe: recipes/digits/causal.yaml, with: {train.steps: 7, optimizers.denoiser.lr: 1e-4}}
  - name: dmd
    title: Self-Forcing
    labels: {steps: 4, inputs: own}
    recipe: recipes/dmd.yaml
    seeds: [1]
    with: {models.generator.weights: tf/denoiser}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(STUDY)
    return path


def test_shared_overrides_then_those_of_the_row_then_the_command_line(study):
    tf, dmd = load_study(study).rows
    assert (tf.stage.recipe.train.steps, dmd.stage.recipe.train.steps) == (7, 5)
    assert (tf.stage.recipe.batch.global_, dmd.stage.recipe.batch.global_) == (4, 4)
    tf, dmd = load_study(study, ["train.steps=9", "tf.batch.global=2", "seeds=[5]"]).rows
    assert (tf.stage.recipe.train.steps, dmd.stage.recipe.train.steps) == (9, 9)
    assert (tf.stage.recipe.batch.global_, dmd.stage.recipe.batch.global_) == (2, 4)
    assert tf.seeds == (5,)


def test_rows_say_how_they_are_shown(study):
    loaded = load_study(study)
    tf, dmd = loaded.rows
    assert (loaded.name, loaded.doc) == ("both", "Two methods.")
    assert ([row.title for row in loaded.rows], [row.seeds for row in loaded.rows]) == (["tf", "Self-Forcing"], [(0, 1), (1,)])
    assert dmd.section.labels == {"steps": 4, "inputs": "own"}
    assert (tf.handoffs, dmd.handoffs) == ({}, {"generator": ("tf", "denoiser")})


def test_overrides_as_text_give_the_same_recipe(study):
    """They are what the command line of each run's process holds."""
    for row in load_study(study, ["eval.with.student_sampling={steps: [1000, 500], shift: 3.0}", "tf.seeds=3"][:1]).rows:
        texts = [text for text in row.overrides if "weights" not in text]
        (stage,) = load_recipe(row.stage.path, texts)
        expected = row.stage.resolved
        if row.name == "dmd":
            expected["models"]["generator"]["weights"] = stage.resolved["models"]["generator"]["weights"]
        assert stage.resolved == expected


def test_a_resolved_study_reads_back(study, tmp_path):
    first = load_study(study, ["seeds=[3, 1]", "train.steps=9", "dmd.phases.critic.every=2", "compile=false"])
    (tmp_path / "again.yaml").write_text(dump_yaml(first.resolved))
    again = load_study(tmp_path / "again.yaml")
    for one, other in zip(first.rows, again.rows, strict=True):
        assert one.stage.recipe == other.stage.recipe
        assert (one.name, one.title, one.seeds, one.section.labels) == (
            other.name, other.title, other.seeds, other.section.labels,
        )  # fmt: skip
    assert again.rows[1].stage.recipe.phases[1].every == 2
    assert again.resolved == first.resolved


def test_weights_of_the_only_seed_serve_all_and_others_must_match(study):
    text = STUDY.replace("seeds: [0, 1]", "seeds: [4]")
    study.write_text(text)
    assert load_study(study).rows[1].seeds == (1,)
    study.write_text(STUDY.replace("seeds: [1]", "seeds: [1, 2]"))
    with pytest.raises(SpecError, match=r"seed 2 takes weights of 'tf', which runs with the seeds \[0, 1\] only") as caught:
        load_study(study)
    assert [(problem.file, problem.line) for problem in caught.value.problems] == [(str(study), 12)]


def test_commands_that_take_a_study_and_those_that_do_not(study, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["check", "both.yaml"])
    assert result.exit_code == 0, result.output
    assert "tf, seeds 0, 1: ok: causal (10 nodes)" in result.output
    assert "dmd, seed 1: ok: generator" in result.output
    assert result.output.endswith("both: ok: 2 rows, 3 runs\n")
    shown = CliRunner().invoke(main, ["show", "both.yaml"])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert (
        "this is a study; `sftk run` and `sftk check` take one @ $.matrix (both.yaml:5); name one of its recipes"
        in shown.stderr
    )
    wrong = CliRunner().invoke(main, ["run", "recipes/dmd.yaml", "--jobs", "2"])
    assert wrong.exit_code == 2
    assert "--jobs is for studies" in wrong.output
