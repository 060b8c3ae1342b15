"""The documentation holds: examples run, tables agree with the code, links resolve, figures are those that the code draws."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.data.ode_pairs import PairSolver, PairTeacher
from sftk.data.sources import SOURCES, option_default
from sftk.models.branch import BranchConfig
from sftk.models.config import WanConfig
from sftk.objectives.divergence import Divergence
from sftk.runtime.evaluate import DigitsEvaluation
from sftk.spec import composed, schema
from sftk.spec.compat import COMPAT
from sftk.spec.files import find_file
from sftk.spec.graphs import FoldSpec, GraphSpec, NodeSpec
from sftk.spec.lowp import LowpSection, ModelLowp
from sftk.spec.optimizer import OptimizerGroup
from sftk.spec.parallel import ModelParallel, ParallelSection
from sftk.spec.params import spec_params
from sftk.spec.plugins import import_file
from sftk.spec.sampling import CausalOdeSampling, SampleSection, StudentSampling, TeacherSampling, WholeFewStepSampling
from sftk.spec.source import read_yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
SPECS = ("specs/dmd_generator.yaml", "specs/score_critic.yaml", "specs/rollout.yaml")
SECTIONS: dict[str, Any] = {
    "Recipe": schema.Recipe,
    "latents": schema.LatentsSection,
    "data": schema.DataSection,
    "data.with.teacher": PairTeacher,
    "data.with.solver": PairSolver,
    "models": schema.ModelSection,
    "models.lowp": ModelLowp,
    "models.parallel": ModelParallel,
    "optimizers.groups": OptimizerGroup,
    "lowp": LowpSection,
    "parallel": ParallelSection,
    "size": WanConfig,
    "branch": BranchConfig,
    "optimizers": schema.OptimizerSection,
    "phases": schema.PhaseSection,
    "train": schema.TrainSection,
    "batch": schema.BatchSection,
    "ema": schema.EmaSection,
    "fetch": schema.FetchSection,
    "eval": schema.EvalSection,
    "checkpoint": schema.CheckpointSection,
    "track": schema.TrackSection,
    "wandb": schema.WandbSection,
    "stages": composed.StageSection,
    "study": composed.StudyRecipe,
    "matrix": composed.RowSection,
    "eval.with": DigitsEvaluation,
    "student_sampling": StudentSampling,
    "student_sampling with causal_ode": CausalOdeSampling,
    "teacher_sampling": TeacherSampling,
    "sample": SampleSection,
    "bidirectional few_step": WholeFewStepSampling,
    "spec": GraphSpec,
    "node": NodeSpec,
    "fold": FoldSpec,
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def file_name(block: str) -> str | None:
    """The name in a block's first line, when it is meant as a file."""
    match = re.match(r"# (\w+\.(?:py|yaml))\n", block)
    return match[1] if match else None


def numbered(language: str) -> list[Any]:
    return [pytest.param(page, i, id=f"{page}-{i}") for page in PAGES for i in range(len(blocks(page, language)))]


def rows(text: str, header: str) -> list[list[str]]:
    """Cells of every table under that header, without backticks."""
    found = []
    for table in re.findall(rf"^\| {re.escape(header)}.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.MULTILINE):
        found += [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return found


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", read(page), re.MULTILINE | re.DOTALL)
    assert match, f"{page} has no heading {heading!r}"
    return match[1]


def shown(value: Any) -> str:
    """A default as the tables write it."""
    if value is attrs.NOTHING:
        return "required"
    if isinstance(value, attrs.Factory):  # pyright: ignore[reportArgumentType]
        return "{}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"as {value[1:]}" if value.startswith("$") else value or "''"
    return str(list(value)) if isinstance(value, tuple | list) else str(value)


def test_readme_opens_with_the_main_job_and_the_tests():
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)
    (first, job), (second, tests) = fences[:2]
    assert (first, second) == ("sh", "sh")
    for block, last in ((job, "sftk run recipes/dmd.yaml"), (tests, "pytest")):
        lines = block.splitlines()
        assert lines[0].endswith("-m venv .venv")
        assert lines[2].startswith("pip install")
        assert lines[-1] == last


@pytest.mark.parametrize(("page", "index"), numbered("python"))
@pytest.mark.usefixtures("nothing_stays_registered")
def test_python_examples_run(page: str, index: int):
    exec(compile(blocks(page, "python")[index], page, "exec"), {"__name__": f"example_{index}"})


@pytest.mark.parametrize(("page", "index"), numbered("yaml"))
@pytest.mark.usefixtures("nothing_stays_registered")
def test_yaml_examples_pass_the_check(page: str, index: int, tmp_path: Path):
    for block in (*blocks(page, "python"), *blocks(page, "yaml")):
        if name := file_name(block):
            (tmp_path / name).write_text(block)
    for plugin in tmp_path.glob("*.py"):
        import_file(plugin)
    text = blocks(page, "yaml")[index]
    path = tmp_path / (file_name(text) or "example.yaml")
    path.write_text(text)
    command = ["check", str(path), "--shapes"] if "version: 1\n" in text else ["show", str(path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("page", "index"), numbered("console"))
def test_shown_sessions_are_what_the_commands_print(page: str, index: int):
    first, *expected = blocks(page, "console")[index].splitlines()
    assert first.startswith("$ sftk ")
    result = CliRunner().invoke(main, shlex.split(first)[2:])
    assert result.output.splitlines() == expected


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_of_a_recipe_is_documented_with_its_default(heading: str):
    documented = {key: default for key, _, default, _ in rows(section("docs/recipes.md", heading), "key | type | default")}
    assert documented == {
        field.name.rstrip("_"): shown(field.default) for field in attrs.fields(SECTIONS[heading]) if field.init
    }


def test_every_data_set_is_documented_with_its_options():
    documented = {(name, option): default for name, option, default, _ in rows(read("docs/recipes.md"), "data set")}
    expected = {(name, o): shown(option_default(name, o)) for name, found in SOURCES.items() for o in found.options}
    assert documented == expected


def test_no_class_of_the_schema_is_left_out():
    made = {
        value
        for module in (schema, composed)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    assert made - set(SECTIONS.values()) == {composed.StagedRecipe}


def test_every_option_is_documented_with_its_default():
    declared: dict[str, Any] = {}
    for spec in reversed(SPECS):
        declared |= spec_params(find_file(spec))
    documented = {}
    for names, default, _ in rows(read("docs/concepts.md"), "option | default"):
        documented |= dict.fromkeys(names.split(", "), default)
    assert documented == {name: shown(value) for name, value in declared.items()}


OBJECTIVES = {
    "DMD": ("dmd",),
    "SiD": ("sid",),
    "Long rollouts": ("rollout_long",),
    "GAN": ("discriminator", "adversarial", "adversarial_relativistic", "gan_generator", "gan_discriminator"),
    "DMD2": ("dmd2_generator", "dmd2_critic"),
    "ODE regression": ("ode_regression",),
    "Teacher forcing and diffusion forcing": ("teacher_forcing", "diffusion_forcing"),
    "Consistency distillation": ("consistency",),
    "Forced inputs": ("student_noised", "student_teacher_forced", "student_diffusion_forced"),
    "MeanFlow": ("meanflow",),
    "sCM": ("scm",),
}
"""Heading of docs/objectives.md to the specs whose own parameters its table lists."""


@pytest.mark.parametrize("heading", OBJECTIVES)
def test_parameters_of_objectives_are_documented_with_their_defaults(heading: str):
    documented = {name: default for name, default, _ in rows(section("docs/objectives.md", heading), "parameter | default")}
    declared = {}
    for name in OBJECTIVES[heading]:
        declared |= read_yaml(find_file(f"specs/{name}.yaml")).get(("params",), {})
    assert documented == {name: shown(value) for name, value in declared.items()}


def test_divergences_are_documented():
    found = {cells[0] for cells in rows(section("docs/objectives.md", "f-distill"), "`divergence`")}
    assert found == set(get_args(Divergence))


def test_compat_table_says_what_compat_sets():
    cells = {row[-1] for row in rows(read("docs/concepts.md"), "matter")}
    said = dict(cell.split(": ") for cell in cells if not cell.startswith("none"))
    assert said == {name: shown(value) for name, value in COMPAT["self_forcing"].items()}


def test_readme_lists_every_command():
    assert {row[0].split()[1] for row in rows(read("README.md"), "command")} == set(main.commands)


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str):
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, f"{page}: {target}"


def test_figures_are_those_that_the_code_draws():
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "docs" / "figures" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = ROOT / "docs" / "figures"
    assert {path.stem for path in folder.glob("*.svg")} == {figure.__name__ for figure in make.FIGURES}
    for figure in make.FIGURES:
        drawn = (folder / f"{figure.__name__}.svg").read_text(encoding="utf-8")
        assert drawn == figure().svg(), f"{figure.__name__}.svg is out of date; run python docs/figures/make.py"
        assert f"figures/{figure.__name__}.svg" in read("docs/concepts.md") + read("docs/study.md")
    assert make.study_table() in read("docs/study.md"), "the table is out of date; run python docs/figures/study.py"
    graphs = make.graphs
    assert {path.stem for path in graphs.FOLDER.glob("*.svg")} == set(graphs.SPECS)
    for name in graphs.SPECS:
        drawn = (graphs.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == graphs.spec_figure(name).svg(), f"specs/{name}.svg is out of date; run python docs/figures/make.py"
