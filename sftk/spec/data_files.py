"""Files that a recipe's data section names: found as specs and weights are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sftk.data.sources import SOURCES
from sftk.spec.document import KeyPath
from sftk.spec.files import find_file


def named_files(use: str, options: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Where a data set's options name a file, and which; those of a `source` inside them among them.

    Example:
        >>> options = {"source": {"use": "prompts", "with": {"path": "a.txt"}}, "teacher": {"weights": "b.safetensors"}}
        >>> list(named_files("ode_pairs", options))
        [(('teacher', 'weights'), 'b.safetensors'), (('source', 'with', 'path'), 'a.txt')]
    """
    if use not in SOURCES:
        return
    for path in SOURCES[use].files:
        value: Any = options
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, str):
            yield path, value
    inner = options.get("source")
    if isinstance(inner, Mapping) and isinstance(inner.get("with"), Mapping):
        for path, name in named_files(str(inner.get("use")), inner["with"]):
            yield ("source", "with", *path), name


def change_files(use: str, options: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of the options with each file's name changed."""
    changed = copy.deepcopy(dict(options))
    for path, name in named_files(use, options):
        place: Any = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = change(name)
    return changed


def found_files(use: str, options: Mapping[str, Any], beside: Path | None) -> dict[str, Any]:
    """A copy of the options with each file's name replaced by where it was found.

    Args:
        beside: the recipe.

    Raises:
        SpecError: a file is missing.
    """
    return change_files(use, options, lambda name: str(find_file(name, beside)))
