"""Studies: a matrix of recipes, overrides and seeds, read and checked as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.composed import RowSection, StudyRecipe
from sftk.spec.convert import structure_what_fits
from sftk.spec.document import Document
from sftk.spec.files import show_path
from sftk.spec.graphs import once
from sftk.spec.parts import apply_with, override, read_part
from sftk.spec.recipe import Check, Stage, find_document, read_apart
from sftk.spec.source import parse_value

_OF_THE_STUDY = ("doc", "seeds", "matrix")
"""Keys that an override changes in the study itself; every other one goes to the rows."""


@attrs.frozen(kw_only=True, eq=False)
class Row:
    """One row of a study, ready to run.

    Args:
        section: what the study says of it.
        stage: its recipe with all overrides but the seed, checked.
        seeds: it runs once with each.
        overrides: the same overrides as `key.path=value`, for the command line.
        handoffs: role to (row, role) of the weights that it takes over from an earlier row.
    """

    section: RowSection
    stage: Stage
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    handoffs: dict[str, tuple[str, str]]

    @property
    def name(self) -> str:
        """Of the row."""
        return self.section.name

    @property
    def title(self) -> str:
        """How a reader sees it."""
        return self.section.title or self.name


@attrs.frozen(kw_only=True, eq=False)
class Study:
    """A study, ready to run: its name (the file's stem), what it is for, and its rows."""

    name: str
    doc: str
    rows: tuple[Row, ...]

    @property
    def resolved(self) -> dict[str, Any]:
        """The study as a plain value, every override in the `with` of its row."""
        matrix = []
        for row in self.rows:
            pairs = (text.partition("=") for text in row.overrides)
            written = {
                "name": row.name,
                "recipe": show_path(row.stage.path.resolve()),
                "title": row.section.title,
                "group": row.section.group,
                "labels": row.section.labels,
                "with": {key.strip(): parse_value(value, "override") for key, _, value in pairs},
                "seeds": list(row.seeds),
            }
            matrix.append({key: value for key, value in written.items() if value not in ("", {})})
        return {"version": 1, "doc": self.doc, "matrix": matrix}


def load_study(path: str | Path, overrides: Sequence[str] = (), *, check: Check | None = None) -> Study:
    """Reads a study and checks every run that it would make.

    Args:
        path: the file, looked up in the working directory and then in the package.
        overrides: `seeds=[0]` and other keys of the study change it, `<row>.key.path=value` the recipe of that row,
            `key.path=value` the recipes of all rows.
        check: a further check of each row's recipe.

    Raises:
        SpecError: with every problem, each with its path, file and line.

    Example:
        >>> study = load_study("recipes/digits/study.yaml", ["seeds=[0, 1]", "train.steps=3"])
        >>> {row.stage.recipe.train.steps for row in study.rows}, study.rows[0].seeds
        ({3}, (0, 1))
    """
    found, document = find_document(path)
    own = [text for text in overrides if _head(text) in _OF_THE_STUDY]
    document, problems = override(document, own)
    study, wrong = structure_what_fits(document, StudyRecipe)
    problems += wrong
    if study is None:
        raise SpecError(once(problems))
    names = [section.name for section in study.matrix]
    if not names:
        problems.append(document.problem(("matrix",), "a study has at least one row"))
    given = [text for text in overrides if text not in own]
    rows: list[Row] = []
    earlier: dict[str, Stage | None] = {}
    for index, section in enumerate(study.matrix):
        if section.name in names[:index]:
            problems.append(document.problem(("matrix", index, "name"), f"two rows are called {section.name!r}"))
        reader = _RowReader(study, document, found, index, rows, earlier)
        row = reader.read([text for text in given if _head(text) not in names or _head(text) == section.name], check)
        problems += reader.problems
        earlier[section.name] = None if row is None else row.stage
        rows += [] if row is None else [row]
    if problems:
        raise SpecError(once(problems))
    return Study(name=found.stem, doc=study.doc, rows=tuple(rows))


def _head(override: str) -> str:
    return override.partition("=")[0].partition(".")[0].partition("[")[0].strip()


class _RowReader:
    """Reads one row, given those before it, and notes what is wrong."""

    def __init__(
        self,
        study: StudyRecipe,
        document: Document,
        path: Path,
        index: int,
        rows: Sequence[Row],
        earlier: Mapping[str, Stage | None],
    ):
        self.study, self.document, self.path, self.place = study, document, path, ("matrix", index)
        self.section = study.matrix[index]
        self.rows, self.earlier = {row.name: row for row in rows}, earlier
        self.problems: list[Problem] = []

    def read(self, overrides: Sequence[str], check: Check | None) -> Row | None:
        section = self.section
        seeds = self.study.seeds if section.seeds is None else section.seeds
        found, inner, wrong = read_part(section.recipe, (*self.place, "recipe"), self.path, self.document, "a row of a study")
        self.problems += wrong
        if inner is None:
            return None
        for with_, place in ((self.study.with_, ("with",)), (section.with_, (*self.place, "with"))):
            inner, wrong = apply_with(inner, with_, place, self.document)
            self.problems += wrong
            if "seed" in with_:
                self._say((*place, "seed"), "the seeds of a study's runs stand in `seeds`", "write seeds: [0, 1, 2]")
        prefix = section.name + "."
        inner, wrong = override(inner, [text for text in overrides if _head(text) != section.name])
        mine = [text.strip().removeprefix(prefix) for text in overrides if _head(text) == section.name]
        self.problems += wrong
        inner, wrong = override(inner, mine, prefix)
        self.problems += wrong
        given = [*(text for text in overrides if _head(text) != section.name), *mine]
        self.problems += [
            Problem(
                path=("seed",),
                message="the seeds of a study's runs stand in `seeds`",
                hint="write seeds=[0]",
                file=f"override {text!r}",
            )
            for text in given
            if _head(text) == "seed"
        ]
        stage, wrong = read_apart(section.name, found, inner, (), self.earlier, check)
        self.problems += wrong
        if stage is None:
            return None
        texts = [f"{key}={json.dumps(value)}" for key, value in (self.study.with_ | section.with_).items()]
        handoffs = self._handoffs(stage, seeds)
        return Row(section=section, stage=stage, seeds=seeds, overrides=(*texts, *given), handoffs=handoffs)

    def _handoffs(self, stage: Stage, seeds: Sequence[int]) -> dict[str, tuple[str, str]]:
        """The weights that the row takes from earlier ones: of the same seed, or of the only one that there is."""
        found: dict[str, tuple[str, str]] = {}
        for role, model in stage.recipe.models.items():
            row, slash, source = (model.weights or "").partition("/")
            if not slash or row not in self.earlier:
                continue
            found[role] = row, source
            before = self.rows.get(row)
            if before is None or source not in before.stage.recipe.models:
                continue  # that is reported where stages are checked
            updated = {name for phase in before.stage.recipe.phases for name in phase.roles}
            at = ("models", role, "weights")
            if source not in updated:
                message = f"{row!r} does not train {source!r}, and so leaves no weights of it"
                self.problems.append(stage.document.problem(at, message, did_you_mean(source, updated)))
            missing = [seed for seed in seeds if seed not in before.seeds]
            if missing and len(before.seeds) > 1:
                message = f"seed {missing[0]} takes weights of {row!r}, which runs with the seeds {list(before.seeds)} only"
                self.problems.append(stage.document.problem(at, message, f"give {row!r} the same seeds, or one for all"))
        return found

    def _say(self, path: tuple[Any, ...], message: str, hint: str | None = None) -> None:
        self.problems.append(self.document.problem(path, message, hint))
