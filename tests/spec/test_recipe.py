"""`sftk check` on recipes that are broken on purpose: every mistake at its place, none else, and no traceback.

A file of `broken/` states what is wrong with it: `# ! $.path :: part of the message` stands on the offending line (several are
separated by ` ! `), `# !! $.path (place) :: part` says a place that is no line of a file of ours. `# args: ...` is an override,
`# also: file` another file whose comments count.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.spec.files import package_root
from sftk.spec.recipe import find_document, is_study, load_recipe

BROKEN = Path(__file__).parent / "broken"
FILES = sorted(path.name for path in BROKEN.glob("*.yaml"))
RECIPES = sorted(str(path.relative_to(package_root())) for path in (package_root() / "recipes").rglob("*.yaml"))
SHOWN = re.compile(r" @ (\$\S*) \((.*?)\)(?:;|$)")
COMMENT = re.compile(r"# (!!?) (.*)$")
PLACED = re.compile(r"(\$\S*) \((.*)\)")


def text_of(file):
    return (BROKEN / file).read_text(encoding="latin-1" if file == "latin_1.yaml" else "utf-8")


def expected(file):
    """What a file says is wrong with it: (path, place, part of the message)."""
    found = []
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        comment = COMMENT.search(line)
        if comment is None:
            continue
        for part in re.split(r" !!? ", comment.group(2)):
            where, _, message = part.partition(" :: ")
            placed = PLACED.fullmatch(where)
            found.append((placed[1], placed[2], message) if placed else (where, f"{file}:{number}", message))
    return found


def all_expected(file):
    text = text_of(file)
    files = [file, *re.findall(r"^# also: (\S+)", text, re.MULTILINE)]
    for graph in re.findall(r"graphs/\w+\.yaml", text):
        files += [graph, *re.findall(r"use: (graphs/\w+\.yaml)", text_of(graph))]
    return [problem for name in dict.fromkeys(files) for problem in expected(name)]


def overrides(file):
    return re.findall(r"^# args: (.*?)(?:  #.*)?$", text_of(file), re.MULTILINE)


def compare(output, wanted):
    assert "Traceback" not in output
    head, *lines = output.rstrip("\n").split("\n")
    left = [*lines]
    absent = []
    for path, place, message in wanted:
        hit = next(
            (line for line in left if SHOWN.search(line) and SHOWN.search(line).groups() == (path, place) and message in line),
            None,
        )
        if hit is None:
            absent.append((path, place, message))
        else:
            left.remove(hit)
    assert (absent, left) == ([], []), output
    assert head == f"error: {len(lines)} problem{'s' * (len(lines) != 1)}"


@pytest.mark.parametrize("file", FILES)
def test_broken_recipe(file, monkeypatch):
    monkeypatch.chdir(BROKEN)
    wanted = all_expected(file)
    assert wanted, "a broken recipe says what is wrong with it"
    result = CliRunner().invoke(main, ["check", file, *overrides(file)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    compare(result.stderr, wanted)


def test_there_are_enough_of_them():
    assert len(FILES) >= 44
    assert sum(len(all_expected(file)) for file in FILES) > 150


@pytest.mark.parametrize("recipe", RECIPES)
def test_shipped_recipes_pass(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    study = is_study(find_document(recipe)[1])  # whose rows are these recipes, with shapes at their own turn
    result = CliRunner().invoke(main, ["check", recipe, "batch.global=2", *([] if study else ["--shapes"])])
    assert result.exit_code == 0, result.output
    assert f"{Path(recipe).stem}: ok: " in result.output
    if not study:
        assert "updates" in result.output
        assert "loss float32 []" in result.output


def test_in_a_process_of_its_own():
    file = "overrides.yaml"
    command = [sys.executable, "-m", "sftk", "check", file, *overrides(file)]
    done = subprocess.run(command, cwd=BROKEN, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    compare(done.stderr, all_expected(file))


@pytest.mark.parametrize("command", ["run", "show"])
def test_other_commands_refuse_the_same_way(command, monkeypatch):
    monkeypatch.chdir(BROKEN)
    before = sorted(BROKEN.iterdir())
    result = CliRunner().invoke(main, [command, "outputs.yaml"])
    assert result.exit_code == 2
    compare(result.stderr, all_expected("outputs.yaml"))
    assert sorted(BROKEN.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such.yaml", "no such file 'no_such.yaml' @ $ (no_such.yaml); did you mean 'such.yaml'?"),
        ("recipes/dmx.yaml", "no such file 'recipes/dmx.yaml' @ $ (recipes/dmx.yaml); did you mean 'recipes/dmd.yaml'?"),
        ("folder", "expected a YAML file, found a directory @ $ (folder)"),
        ("empty.yaml", "the document is empty @ $ (empty.yaml)"),
    ],
)
def test_files_that_are_no_recipe(name, problem, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "such.yaml").write_text("version: 1\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "folder").mkdir()
    for command in ("check", "run", "show"):
        result = CliRunner().invoke(main, [command, name])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"error: 1 problem\n  {problem}\n"


def test_overrides_reach_the_recipe_in_order():
    (stage,) = load_recipe(
        "recipes/dmd.yaml", ["phases.critic.every=3", "phases[0].clip=null", "seed=1", "seed=2", "checkpoint.keep=9"]
    )
    assert (stage.recipe.phases[1].every, stage.recipe.phases[0].clip, stage.recipe.seed) == (3, None, 2)
    (plain,) = load_recipe("recipes/dmd.yaml")
    assert (stage.recipe.checkpoint.keep, stage.recipe.checkpoint.every) == (9, plain.recipe.checkpoint.every)
    assert stage.recipe.batch == plain.recipe.batch


def every_node(graph):
    for node in graph.nodes:
        yield node
        if hasattr(node.op, "nodes"):
            yield from every_node(node.op)


def test_compat_sets_defaults_and_what_a_recipe_binds_wins():
    def options(*more):
        (stage,) = load_recipe("recipes/dmd.yaml", ["compat=self_forcing", *more])
        rollout = next(node.op for node in stage.graphs["generator"].nodes if node.op.name == "rollout")
        scores = [node.options for node in every_node(stage.graphs["generator"]) if node.op.name == "predict_x0_cfg"]
        inner = {
            name: value
            for fold in rollout.nodes
            for node in getattr(fold.op, "nodes", ())
            for name, value in node.options.items()
        }
        return inner["context_gradient"], scores[0]["shift"], scores[0]["schedule"]

    assert options() == ("straight_through", 8.0, "table")
    bound = "phases.generator.with.context_gradient=detach", "phases.generator.with.score_shift=2.0"
    assert options(*bound) == ("detach", 2.0, "table")


STAGED = """\
version: 1
stages:
  - {name: teacher, recipe: recipes/digits/teacher.yaml, with: {train.steps: 2, phases.teacher.every: 3}}
  - {name: dmd, recipe: recipes/dmd.yaml, with: {models.generator.weights: teacher/denoiser, models.real_score.weights: null}}
"""


def test_stages_take_prefixed_overrides_and_the_last_one_the_others(tmp_path):
    (tmp_path / "all.yaml").write_text(STAGED)
    first, last = load_recipe(tmp_path / "all.yaml", ["train.steps=5", "teacher.seed=4", "dmd.batch.global=3"])
    assert (first.name, first.recipe.train.steps, first.recipe.seed, first.recipe.phases[0].every) == ("teacher", 2, 4, 3)
    assert (last.name, last.recipe.train.steps, last.recipe.seed, last.recipe.batch.global_) == ("dmd", 5, 0, 3)
    assert last.recipe.models["generator"].weights == "teacher/denoiser"
    assert last.recipe.models["real_score"].weights is None


def test_a_resolved_recipe_reads_back_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "here" / "graphs").mkdir(parents=True)
    graph = (package_root() / "specs" / "flow_matching.yaml").read_text()
    (tmp_path / "here" / "graphs" / "own.yaml").write_text(graph.replace("drop: 0.1", "drop: 0.3"))
    (tmp_path / "here" / "plugin.py").write_text("LOADED = True\n")
    source = (package_root() / "recipes" / "digits" / "teacher.yaml").read_text()
    own = source.replace("specs/flow_matching.yaml", "graphs/own.yaml").replace("seed: 0", "seed: 0\nplugins: [plugin.py]")
    (tmp_path / "here" / "own.yaml").write_text(own.replace(", drop: 0.1}", "}"))
    (stage,) = load_recipe(tmp_path / "here" / "own.yaml", ["train.steps=7"])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "recipe.yaml").write_text(stage.text)
    monkeypatch.chdir(tmp_path / "there")
    (again,) = load_recipe("recipe.yaml")
    assert again.recipe.train.steps == 7
    drop = next(node for node in again.graphs["teacher"].nodes if node.op.name == "drop_condition")
    assert drop.options["rate"] == 0.3
    assert again.text == stage.text
    shipped = load_recipe("recipes/dmd.yaml")[0]
    assert shipped.resolved == shipped.document.value


def test_a_resolved_recipe_of_stages_reads_back(tmp_path):
    from sftk.runtime.run import _resolved

    (tmp_path / "all.yaml").write_text(STAGED)
    stages = load_recipe(tmp_path / "all.yaml", ["train.steps=5"])
    (tmp_path / "recipe.yaml").write_text(_resolved(stages))
    again = load_recipe(tmp_path / "recipe.yaml", ["teacher.seed=2", "seed=3"])
    assert [(stage.name, stage.recipe.train.steps, stage.recipe.seed) for stage in again] == [("teacher", 2, 2), ("dmd", 5, 3)]
    assert again[1].recipe.phases == stages[1].recipe.phases
