"""What a recipe's plugins register, and that the next recipe of the same process does not see it."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.core import transforms
from sftk.core.plugins import scope
from sftk.data.codecs import CODECS
from sftk.data.sources import SOURCES
from sftk.runtime.evaluators import EVALUATORS
from sftk.spec.recipe import load_recipe

TRANSFORM = """\
from sftk import transform


@transform(out="gradient_mask", kind="per_sample")
def {name}(latents):
    return latents[:, :, 0, 0, 0] > 0
"""
GRAPH = """\
doc: Flow matching on some frames only.
inputs: [latents, prompt_embeds, key]
models: [denoiser]
nodes:
  - {use: draw_timestep, in: {like: latents}}
  - {use: draw_noise, in: {like: latents}}
  - {use: add_noise, in: {x0: latents}}
  - {use: flow_target, in: {x0: latents}}
  - {use: predict_flow}
  - {use: MASK}
  - {use: flow_matching_loss}
outputs: [loss, loss_weight]
"""
RECIPE = """\
version: 1
doc: Two recipes with plugins of their own.
plugins: PLUGINS
latents: {frames: 6, channels: 4, height: 8, width: 8}
data: {use: DATA}
models: {denoiser: {size: digits}}
optimizers: {denoiser: {lr: 1e-3}}
phases: [{name: own, update: denoiser, graph: GRAPH}]
train: {steps: 1}
batch: {global: 2}
"""
SOURCE = 'from sftk.data.sources import SOURCES\nSOURCES["clips of a"] = SOURCES["digits"]\n'


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(name, mask, plugins, data="digits")`: a recipe and its graph, whose loss is masked by the transform `mask`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def recipe(name, mask, plugins, data="digits"):
        (tmp_path / f"{name}_graph.yaml").write_text(GRAPH.replace("MASK", mask))
        text = RECIPE.replace("PLUGINS", plugins).replace("GRAPH", f"{name}_graph.yaml").replace("DATA", data)
        (tmp_path / f"{name}.yaml").write_text(text)
        return f"{name}.yaml"

    return recipe


def check(*recipes):
    result = CliRunner().invoke(main, ["check", *recipes, "--shapes"])
    return result.exit_code, result.output


def registered():
    return dict(transforms()), dict(SOURCES), dict(CODECS), dict(EVALUATORS)


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.parametrize("order", [("a.yaml", "b.yaml"), ("b.yaml", "a.yaml")])
def test_a_recipe_sees_its_own_plugins_only(write, tmp_path, order):
    """b uses what only a's plugin registers."""
    (tmp_path / "a.py").write_text(TRANSFORM.format(name="mask_of_a") + SOURCE)
    (tmp_path / "b.py").write_text(TRANSFORM.format(name="mask_of_b"))
    write("a", "mask_of_a", "[a.py]", "clips of a")
    write("b", "mask_of_a", "[b.py]", "clips of a")
    before, modules = registered(), set(sys.modules)
    code, said = check(*order)
    assert code == 2
    assert "a: ok: own (7 nodes)" in said
    assert "b.yaml: error: 2 problems\n" in said
    assert "unknown transform 'mask_of_a' @ $.nodes[5].use (b_graph.yaml:10); did you mean 'mask_of_b'?" in said
    assert "unknown data set 'clips of a' @ $.data.use (b.yaml:5); expected one of " in said
    assert said.endswith("1 of 2 recipes failed: b.yaml\n")
    assert registered() == before
    assert not [name for name in set(sys.modules) - modules if name.startswith("sftk_plugin_")]
    assert check("b.yaml")[0] == 2


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.parametrize("order", [("a.yaml", "b.yaml"), ("b.yaml", "a.yaml"), ("a.yaml", "c.yaml", "b.yaml", "a.yaml")])
def test_what_both_take_is_there_for_both(write, tmp_path, order):
    """The same file and a package that one names and the other's plugin imports; two files give one name to two transforms."""
    (tmp_path / "ours_for_test").mkdir()
    (tmp_path / "ours_for_test" / "__init__.py").write_text("")
    (tmp_path / "ours_for_test" / "nodes.py").write_text(TRANSFORM.format(name="mask_of_ours"))
    (tmp_path / "shared.py").write_text(SOURCE)
    (tmp_path / "through.py").write_text("import ours_for_test.nodes\n" + TRANSFORM.format(name="mask_of_two"))
    (tmp_path / "other.py").write_text(TRANSFORM.format(name="mask_of_two"))
    write("a", "mask_of_ours", "[shared.py, ours_for_test.nodes]", "clips of a")
    write("b", "mask_of_ours", "[through.py, shared.py]", "clips of a")
    write("c", "mask_of_two", "[other.py]")
    code, said = check(*order)
    assert code == 0, said
    assert said.count(": ok: own (7 nodes)") == len(order)
    assert "ours_for_test" not in sys.modules


def test_a_scope_forgets_what_fails_and_what_replaces(write, tmp_path):
    (tmp_path / "half.py").write_text(SOURCE + 'SOURCES["digits"] = SOURCES["random"]\nraise ZeroDivisionError\n')
    before = registered()
    code, said = check(write("a", "mask_frames", "[half.py]"), "recipes/dmd.yaml")
    assert code == 2
    assert "the plugin 'half.py' cannot be imported: ZeroDivisionError" in said
    assert "dmd: ok:" in said
    assert registered() == before


def test_without_a_scope_plugins_stay(write, tmp_path):
    """A run looks data up by name after its recipe was read."""
    (tmp_path / "a.py").write_text(TRANSFORM.format(name="mask_of_a") + SOURCE)
    with scope():
        (stage,) = load_recipe(write("a", "mask_of_a", "[a.py]", "clips of a"))
        assert stage.recipe.data.use in SOURCES
        assert "mask_of_a" in transforms()
    assert "clips of a" not in SOURCES


PARTS = {
    "stages.yaml": "version: 1\nstages:\n  - {name: first, recipe: FIRST}\n  - {name: second, recipe: SECOND}\n",
    "study.yaml": "version: 1\nmatrix:\n  - {name: first, recipe: FIRST}\n  - {name: second, recipe: SECOND}\n",
}
CLIPS = """\
from pathlib import Path

from sftk.data.digits import DigitClips
from sftk.data.sources import SOURCES, DataSource


def clips(frames, seed):
    with Path("made.txt").open("a") as file:
        file.write("{name} ")
    return DigitClips("train", size=4, frames=frames, seed=seed)


SOURCES["clips"] = DataSource(make=clips, keys=SOURCES["digits"].keys)
"""


@pytest.fixture(params=PARTS)
def parts(request, tmp_path):
    """`parts(first, second)`: a recipe of two stages, or a study of two rows; its name."""

    def write(first, second):
        (tmp_path / request.param).write_text(PARTS[request.param].replace("FIRST", first).replace("SECOND", second))
        return request.param

    return write


@pytest.mark.usefixtures("nothing_stays_registered")
def test_a_later_stage_or_row_does_not_see_the_plugins_of_an_earlier_one(write, parts, tmp_path):
    (tmp_path / "a.py").write_text(TRANSFORM.format(name="mask_of_a") + SOURCE)
    write("a", "mask_of_a", "[a.py]", "clips of a")
    write("b", "mask_of_a", "[]", "clips of a")
    code, said = check(parts("a.yaml", "b.yaml"))
    assert code == 2
    assert "2 problems" in said
    assert "unknown transform 'mask_of_a' @ $.nodes[5].use (b_graph.yaml:10)" in said
    assert "unknown data set 'clips of a' @ $.data.use (b.yaml:5)" in said


@pytest.mark.usefixtures("nothing_stays_registered")
def test_stages_and_rows_give_one_name_to_two_things(write, parts, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(TRANSFORM.format(name="mask_of_both") + CLIPS.format(name=name))
        write(name, "mask_of_both", f"[{name}.py]", "clips")
    code, said = check(parts("a.yaml", "b.yaml"))
    assert code == 0, said
    assert said.count(": ok: own (7 nodes)") == 2
    assert (tmp_path / "made.txt").read_text() == "a b "


@pytest.mark.usefixtures("nothing_stays_registered")
def test_each_stage_of_a_run_has_its_own(write, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(TRANSFORM.format(name="mask_of_both") + CLIPS.format(name=name))
        write(name, "mask_of_both", f"[{name}.py]", "clips")
    (tmp_path / "both.yaml").write_text(PARTS["stages.yaml"].replace("FIRST", "a.yaml").replace("SECOND", "b.yaml"))
    run = ["both.yaml", "device=cpu", "first.device=cpu", "--run-dir", "run"]
    found = CliRunner().invoke(main, ["run", *run])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "made.txt").read_text() == "a b "
    assert [stage.name for stage in load_recipe("run/recipe.yaml")] == ["first", "second"]
