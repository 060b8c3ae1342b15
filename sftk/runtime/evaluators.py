"""Named evaluators: what a recipe's `eval.use` may say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from sftk.core.plugins import extensible
from sftk.errors import Problem, SpecError, did_you_mean
from sftk.runtime.evaluate import DigitsEvaluation, DigitsEvaluator
from sftk.spec.convert import structure
from sftk.spec.document import Document
from sftk.spec.schema import Recipe


@attrs.frozen(kw_only=True)
class Evaluator:
    """Options class of an evaluator, and what makes it: `make(options, frames, device, mesh)`. Every rank calls it."""

    options: type[Any]
    make: Callable[..., Any]


EVALUATORS: dict[str, Evaluator] = {"digits": Evaluator(options=DigitsEvaluation, make=DigitsEvaluator)}
"""Evaluators by name; a plugin may add its own."""
extensible(EVALUATORS)


def evaluation_options(document: Document, recipe: Recipe) -> Any:
    """The options of a recipe's evaluation, checked.

    Args:
        document: the recipe as read.
        recipe: what it says; has an `eval` section.

    Raises:
        SpecError: the evaluator, an option or a role is unknown.
    """
    section = recipe.eval
    assert section is not None
    if section.use not in EVALUATORS:
        hint = did_you_mean(section.use, EVALUATORS)
        raise SpecError([document.problem(("eval", "use"), f"unknown evaluator {section.use!r}", hint)])
    place = ("eval", "with")
    try:
        part = document.at(place) if section.with_ else attrs.evolve(document, value={}, marks={})
        options = structure(part, EVALUATORS[section.use].options)
    except SpecError as error:
        raise SpecError([problem.under(*place) for problem in error.problems]) from error
    problems = [
        document.problem((*place, field), f"{role!r} is not a model of this recipe", did_you_mean(role, models))
        for models in [recipe.models]
        for field in ("student", "teacher")
        if (role := getattr(options, field, None)) is not None and role not in models
    ]
    if problems:
        raise SpecError(problems)
    return options


def evaluation_problems(document: Document, recipe: Recipe) -> list[Problem]:
    """What is wrong with a recipe's `eval` section; nothing when it has none."""
    if recipe.eval is None:
        return []
    try:
        options = evaluation_options(document, recipe)
    except SpecError as error:
        return list(error.problems)
    check = getattr(options, "problems", None)
    found = check(recipe.latents.frames) if check is not None else ()
    return [document.problem(("eval", "with", *path), message, hint) for path, message, hint in found]


def evaluation_enabled(recipe: Recipe) -> bool:
    """Whether the run ends with an evaluation."""
    return recipe.eval is not None and recipe.eval.enabled
