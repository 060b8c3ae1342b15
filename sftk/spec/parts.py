"""Recipes that another file names, a stage's or a study's row: found, read, and changed as that file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftk.errors import Problem, SpecError
from sftk.spec.document import Document, KeyPath
from sftk.spec.files import find_file, show_path
from sftk.spec.overrides import apply_overrides, set_value
from sftk.spec.source import read_yaml


def read_part(
    recipe: str, place: KeyPath, path: Path, document: Document, what: str
) -> tuple[Path, Document | None, list[Problem]]:
    """The recipe that a document names at `place`.

    Args:
        recipe: the name, looked up beside `path` first.
        place: of the name in the document.
        path, document: the file that names it.
        what: what the recipe is there, in words.

    Returns:
        Its file; what it says, or None where that cannot be read or is no plain recipe; problems.

    Example:
        >>> from sftk.spec.source import parse_yaml
        >>> outer = parse_yaml("recipe: recipes/dmx.yaml", "all.yaml")
        >>> read_part("recipes/dmx.yaml", ("recipe",), Path("all.yaml"), outer, "a stage")[2][0].hint
        "did you mean 'recipes/dmd.yaml'?"
    """
    try:
        found = find_file(recipe, path)
        inner = read_yaml(found, show_path(found))
    except SpecError as error:
        return path, None, [document.problem(place, p.message, p.hint) if p.file is None else p for p in error.problems]
    parts = next((key for key in ("stages", "matrix") if isinstance(inner.value, dict) and key in inner.value), None)
    if parts is not None:
        own = "stages" if parts == "stages" else "a matrix"
        return found, None, [document.problem(place, f"{recipe} has {own} of its own; {what} is a plain recipe")]
    return found, inner, []


def apply_with(inner: Document, with_: Mapping[str, Any], place: KeyPath, document: Document) -> tuple[Document, list[Problem]]:
    """The inner recipe with the values of a `with` at `place` of the document, to which errors in them will point.

    Example:
        >>> from sftk.spec.source import parse_yaml
        >>> outer = parse_yaml("with:\\n  train.steps: 3", "all.yaml")
        >>> inner, _ = apply_with(parse_yaml("seed: 1", "one.yaml"), outer.value["with"], ("with",), outer)
        >>> inner.value, inner.where(("train", "steps"))
        ({'seed': 1, 'train': {'steps': 3}}, ('all.yaml', 2))
    """
    problems: list[Problem] = []
    for key, value in with_.items():
        file, line = document.where((*place, key))
        try:
            inner = set_value(inner, key, value, file, line)
        except SpecError as error:
            problems += error.problems
    return inner, problems


def override(document: Document, overrides: Sequence[str], prefix: str = "") -> tuple[Document, list[Problem]]:
    """The document with the overrides that can be applied, and what is wrong with the others.

    Example:
        >>> from sftk.spec.source import parse_yaml
        >>> changed, problems = override(parse_yaml("seed: 1", "one.yaml"), ["seed=2", "seed"])
        >>> changed.value, len(problems)
        ({'seed': 2}, 1)
    """
    problems: list[Problem] = []
    for text in overrides:
        try:
            document = apply_overrides(document, [text], prefix=prefix)
        except SpecError as error:
            problems += error.problems
    return document, problems
