"""What recipes made of other recipes may say: stages one after the other, and studies side by side."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from sftk.spec.schema import SEEDS
from sftk.spec.validators import plain_name, within


@attrs.frozen(kw_only=True)
class StageSection:
    """One stage of a recipe with `stages`: another recipe and overrides of it (`key.path: value`)."""

    name: str = attrs.field(validator=plain_name)
    recipe: str
    with_: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class StagedRecipe:
    """A recipe that runs others one after the other."""

    version: Literal[1]
    doc: str = ""
    stages: tuple[StageSection, ...]


def _distinct_seeds(instance: Any, attribute: Any, value: tuple[int, ...] | None) -> None:
    if value is not None and (not value or len(set(value)) < len(value)):
        raise ValueError(f"seeds are different integers, at least one, found {list(value)}")
    within(0, SEEDS)(instance, attribute, value)


@attrs.frozen(kw_only=True)
class RowSection:
    """One row of a study: a recipe, overrides of it, and the seeds with which it runs (those of the study by default).

    `title`, `group` and `labels` say how the report shows it.
    """

    name: str = attrs.field(validator=plain_name)
    recipe: str
    title: str = ""
    group: str = ""
    labels: dict[str, str | int | float] = attrs.field(factory=dict)
    with_: dict[str, Any] = attrs.field(factory=dict)
    seeds: tuple[int, ...] | None = attrs.field(default=None, validator=_distinct_seeds)


@attrs.frozen(kw_only=True)
class StudyRecipe:
    """Recipes side by side: every row of `matrix` with every seed. `with` overrides all rows."""

    version: Literal[1]
    doc: str = ""
    seeds: tuple[int, ...] = attrs.field(default=(0,), validator=_distinct_seeds)
    with_: dict[str, Any] = attrs.field(factory=dict)
    matrix: tuple[RowSection, ...]
