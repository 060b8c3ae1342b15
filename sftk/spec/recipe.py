"""Recipes: read, override, check as a whole, and resolve into graphs, without loading a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from sftk.core.graph import Graph
from sftk.core.plugins import scope
from sftk.errors import Problem, SpecError
from sftk.spec.checks import Checks
from sftk.spec.compat import compat_defaults
from sftk.spec.composed import StagedRecipe
from sftk.spec.convert import structure_what_fits
from sftk.spec.document import Document
from sftk.spec.files import find_file, show_path
from sftk.spec.graphs import build_graph, once
from sftk.spec.params import Origin
from sftk.spec.parts import apply_with, override, read_part
from sftk.spec.plugins import load_plugins
from sftk.spec.schema import PhaseSection, Recipe
from sftk.spec.sizes import fill_sizes
from sftk.spec.source import read_yaml
from sftk.spec.stage import Stage

FROM_PYTHON = "recipe"
"""What stands for the file of a recipe that Python gives, in messages and as its name."""

Check = Callable[[Document, Recipe], list[Problem]]
"""A further check of one stage, from a layer above this one."""


def load_recipe(
    path: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    check: Check | None = None,
    graphs: Mapping[str, Graph] | None = None,
) -> tuple[Stage, ...]:
    """Reads a recipe and checks everything that can be known before weights are loaded.

    Args:
        path: the file, looked up in the working directory and then in the package, or what such a file would say.
        overrides: `key.path=value`; `stage:` recipes take `<stage>.key.path=value`, and unprefixed ones go to the last stage.
        check: a further check of each stage, whose problems are reported with the others.
        graphs: phase name to a graph made in Python, for phases without `graph` (of a recipe without `stages`).

    Returns:
        Its stages, in order; one for a plain recipe.

    Raises:
        SpecError: with every problem, each with its path, file and line.

    Example:
        >>> [stage.name for stage in load_recipe("recipes/dmd.yaml", ["train.steps=10"])]
        ['dmd']
    """
    if isinstance(path, Mapping):
        found, document = Path(f"{FROM_PYTHON}.yaml"), Document(value=copy.deepcopy(dict(path)), file=FROM_PYTHON)
    else:
        found, document = find_document(path)
    if is_study(document):
        message = "this is a study; `sftk run` and `sftk check` take one"
        raise SpecError([document.problem(("matrix",), message, "name one of its recipes")])
    if not (isinstance(document.value, dict) and "stages" in document.value):
        stage, problems = read_stage(found.stem, found, document, overrides, {}, check, graphs)
        if stage is None or problems:
            raise SpecError(once(problems))
        return (stage,)
    resolved = isinstance(document.value["stages"], dict)
    parts, problems = _resolved_parts(found, document) if resolved else _parts(found, document)
    if not parts and not problems:
        problems.append(document.problem(("stages",), "a recipe with `stages` has at least one"))
    stages = _read_stages(parts, overrides, check, problems)
    if problems:
        raise SpecError(once(problems))
    return stages


def find_document(path: str | Path) -> tuple[Path, Document]:
    """A YAML file that a user names, looked up in the working directory and then in the package, and what it says.

    Raises:
        SpecError: there is none, or it is no YAML.
    """
    try:
        found = find_file(str(path))
    except SpecError as error:
        raise SpecError([attrs.evolve(problem, file=str(path)) for problem in error.problems]) from error
    return found, read_yaml(found, show_path(found))


def is_study(document: Document) -> bool:
    """Whether a document is a study, that is, has a `matrix`.

    Example:
        >>> is_study(find_document("recipes/dmd.yaml")[1])
        False
    """
    return isinstance(document.value, dict) and "matrix" in document.value


Part = tuple[str, Path, Document | None]
"""A stage's name, its recipe file and what it says; None when that cannot be read."""


def _resolved_parts(path: Path, document: Document) -> tuple[list[Part], list[Problem]]:
    """The parts of the recipe that a run with stages writes: whole recipes by name."""
    problems = [
        document.problem((key,), f"unknown key {key!r}", "only `stages` stands here")
        for key in document.value
        if key != "stages"
    ]
    return [(name, path, document.at(("stages", name))) for name in document.value["stages"]], problems


def _parts(path: Path, document: Document) -> tuple[list[Part], list[Problem]]:
    """The parts of a recipe with `stages`: other recipes, with their `with` applied."""
    staged, problems = structure_what_fits(document, StagedRecipe)
    if staged is None:
        return [], problems
    names = [stage.name for stage in staged.stages]
    parts: list[Part] = []
    for index, section in enumerate(staged.stages):
        if section.name in names[:index]:
            problems.append(document.problem(("stages", index, "name"), f"two stages are called {section.name!r}"))
        place = ("stages", index)
        found, inner, wrong = read_part(section.recipe, (*place, "recipe"), path, document, "a stage")
        problems += wrong
        if inner is not None:
            inner, wrong = apply_with(inner, section.with_, (*place, "with"), document)
            problems += wrong
        parts.append((section.name, found, inner))
    return parts, problems


def _read_stages(
    parts: Sequence[Part], overrides: Sequence[str], check: Check | None, problems: list[Problem]
) -> tuple[Stage, ...]:
    names = [name for name, _, _ in parts]
    taken: dict[str, list[str]] = {name: [] for name in names}
    last: list[str] = []
    for text in overrides:
        head, dot, rest = text.partition(".")
        prefixed = dot and head in taken
        (taken[head] if prefixed else last).append(rest if prefixed else text)
    stages: dict[str, Stage | None] = {}
    for index, (name, path, document) in enumerate(parts):
        if document is None:
            stages[name] = None
            continue
        document, wrong = override(document, taken[name], f"{name}.")
        problems += wrong
        stage, wrong = read_apart(name, path, document, last if index == len(parts) - 1 else (), stages, check)
        problems += wrong
        stages[name] = stage
    found = tuple(stage for stage in stages.values() if stage is not None)
    for stage in found:
        stage.plugins.stay()  # for what looks things up by name later on
    return found


def read_apart(
    name: str,
    path: Path,
    document: Document,
    overrides: Sequence[str],
    earlier: Mapping[str, Stage | None],
    check: Check | None,
) -> tuple[Stage | None, list[Problem]]:
    """`read_stage` of one of several, each with its own plugins only; afterwards none of them is registered."""
    with scope() as plugins:
        stage, problems = read_stage(name, path, document, overrides, earlier, check)
    return None if stage is None else attrs.evolve(stage, plugins=plugins), problems


def read_stage(
    name: str,
    path: Path,
    document: Document,
    overrides: Sequence[str],
    earlier: Mapping[str, Stage | None],
    check: Check | None,
    given: Mapping[str, Graph] | None = None,
) -> tuple[Stage | None, list[Problem]]:
    """A stage and its problems. Where the schema refuses something without a default, that hides what is checked after it.

    Args:
        name: of the stage.
        path, document: its recipe.
        overrides: `key.path=value`.
        earlier: what ran before it, whose weights it may take; None where that cannot be read.
        check: see `load_recipe`.
        given: graphs made in Python, by phase.
    """
    document, problems = override(document, overrides)
    recipe, wrong = structure_what_fits(document, Recipe)
    problems += wrong
    if recipe is None:
        return None, problems
    problems += load_plugins(recipe, document, path)
    recipe, wrong = fill_sizes(recipe, document, path, earlier)
    problems += wrong
    built: list[Graph | None] = []
    for index, phase in enumerate(recipe.phases):
        graph, wrong = _phase_graph(recipe, phase, index, document, path, given or {})
        problems += wrong
        built.append(graph)
    graphs = {phase.name: graph for phase, graph in zip(recipe.phases, built, strict=True) if graph is not None}
    problems += Checks(recipe, document, built, path, earlier).all()
    if check is not None:
        problems += check(document, recipe)
    return Stage(name=name, recipe=recipe, graphs=graphs, document=document, path=path), problems


def _phase_graph(
    recipe: Recipe, phase: PhaseSection, index: int, document: Document, path: Path, given: Mapping[str, Graph]
) -> tuple[Graph | None, list[Problem]]:
    place = ("phases", index)
    if phase.graph is None:
        if phase.name in given:
            return given[phase.name], []
        hint = f"name a spec, or give one in Python: run_recipe(..., graphs={{{phase.name!r}: Graph(...)}})"
        return None, [document.problem(place, f"the phase {phase.name!r} has no graph", hint)]
    try:
        found = find_file(phase.graph, path)
    except SpecError as error:
        return None, [document.problem((*place, "graph"), p.message, p.hint) for p in error.problems]
    bound = {
        name: Origin(value=_tuples(value), document=document, path=(*place, "with", name))
        for name, value in phase.with_.items()
    }
    return build_graph(
        found, bound, frames=recipe.latents.frames, defaults=compat_defaults(recipe.compat) | recipe.lowp.defaults
    )


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
