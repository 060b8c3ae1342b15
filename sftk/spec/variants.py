"""Variants of a recipe, to be measured one after the other: names and overrides, read from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from sftk.errors import Problem, SpecError
from sftk.spec.convert import structure
from sftk.spec.recipe import Stage, find_document, load_recipe
from sftk.spec.validators import plain_name


@attrs.frozen(kw_only=True)
class VariantSection:
    """One variant: its name, and `with`, the overrides that make it (`key.path: value`)."""

    name: str = attrs.field(validator=plain_name)
    with_: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True, eq=False)
class Variant:
    """A variant, checked: its name, its overrides as on the command line, and the stage that they make of the recipe."""

    name: str
    overrides: tuple[str, ...]
    stage: Stage


def load_variants(recipe: str | Path, overrides: Sequence[str] = (), file: str | Path | None = None) -> tuple[Variant, ...]:
    """The variants of a recipe that a file lists; without a file the recipe as it is.

    Args:
        recipe: as for `load_recipe`; of one with stages, the last is taken.
        overrides: of all variants, before their own.
        file: a YAML list of `VariantSection`.

    Raises:
        SpecError: with every problem of every variant.

    Example:
        >>> [(variant.name, variant.stage.name) for variant in load_variants("recipes/digits/df.yaml", ["seed=3"])]
        [('df', 'df')]
    """
    if file is None:
        stage = load_recipe(recipe, overrides)[-1]
        return (Variant(name=stage.name, overrides=tuple(overrides), stage=stage),)
    found, problems = [], []
    _, document = find_document(file)
    sections = structure(document, tuple[VariantSection, ...])
    for index, section in enumerate(sections):
        if section.name in [earlier.name for earlier in sections[:index]]:
            problems.append(document.problem((index, "name"), f"two variants are called {section.name!r}"))
        own = [f"{key}={json.dumps(value)}" for key, value in section.with_.items()]
        try:
            stage = load_recipe(recipe, [*overrides, *own])[-1]
        except SpecError as error:
            problems += [_of_variant(problem, section.name) for problem in error.problems]
        else:
            found.append(Variant(name=section.name, overrides=(*overrides, *own), stage=stage))
    if not sections:
        problems.append(document.problem((), "the list of variants is empty"))
    if problems:
        raise SpecError(problems)
    return tuple(found)


def _of_variant(problem: Problem, name: str) -> Problem:
    return attrs.evolve(problem, message=f"variant {name!r}: {problem.message}")
