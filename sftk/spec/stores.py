"""Whether the stores of data that a recipe names hold what it asks for: known before its first stage begins."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from sftk.data.sources import SOURCES
from sftk.errors import DataError, Problem, SpecError
from sftk.spec.data_files import found_files
from sftk.spec.graphs import once
from sftk.spec.recipe import Stage


def check_stores(stages: Iterable[Stage]) -> None:
    """Looks at what the data files of stages say of themselves, of those that are there.

    Args:
        stages: from `load_recipe`.

    Raises:
        SpecError: files hold something else than their stage's recipe says; every stage's is listed, with its file and line.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> check_stores(load_recipe("recipes/digits/init.yaml"))
    """
    problems = [problem for stage in stages for problem in store_problems(stage)]
    if problems:
        raise SpecError(once(problems))


def store_problems(stage: Stage) -> list[Problem]:
    """What is wrong with the data files of one stage."""
    recipe, data = stage.recipe, stage.recipe.data
    with stage.plugins.again():
        try:
            options = found_files(data.use, data.with_, stage.path)
        except SpecError:  # not here yet; `fetch` says how it comes
            return []
        try:
            SOURCES[data.use].check_files(**attrs.asdict(recipe.latents), options=options)
        except DataError as error:
            return [stage.document.problem(("data", "with"), f"stage {stage.name!r}: {error}")]
    return []
