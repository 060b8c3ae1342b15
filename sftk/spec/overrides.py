"""Overrides from the command line: `phases.critic.every=1`."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import attrs

from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.document import Document, KeyPath
from sftk.spec.source import parse_value

_PART = re.compile(r"([^\[\]]*)((?:\[[^\[\]]+\])*)")


def apply_overrides(document: Document, overrides: Sequence[str], *, prefix: str = "") -> Document:
    """Set values in a document, in order. The document itself is left as it is.

    Args:
        document: what to change.
        overrides: texts `key.path=value`. A list's item is addressed by its index (`phases.0.every` or
            `phases[0].every`) or by its `name` (`phases.critic.every`); the value is a YAML 1.2 scalar or a flow
            collection. Missing mappings on the way are made.
        prefix: what stood before each of them on the command line; only shown.

    Returns:
        A new document, in which an overridden value's place is the override.

    Raises:
        SpecError: with the problems of all overrides that cannot be applied.

    Example:
        >>> from sftk.spec.source import parse_yaml
        >>> recipe = parse_yaml("phases: [{name: critic, every: 5}]", "dmd.yaml")
        >>> changed = apply_overrides(recipe, ["phases.critic.every=1", "optimizer.lr=1e-4"])
        >>> changed.value
        {'phases': [{'name': 'critic', 'every': 1}], 'optimizer': {'lr': 0.0001}}
        >>> changed.where(("phases", 0, "every"))
        ("override 'phases.critic.every=1'", None)
        >>> apply_overrides(recipe, ["phases.crtic.every=1"])
        Traceback (most recent call last):
        sftk.errors.SpecError: no item is named 'crtic' @ $.phases (override 'phases.crtic.every=1'); did you mean 'critic'?
    """
    problems: list[Problem] = []
    document = attrs.evolve(document, value=copy.deepcopy(document.value))
    for text in overrides:
        file = f"override {prefix + text!r}"
        key, equals, value_text = text.partition("=")
        try:
            if not equals:
                raise _error("expected key.path=value, found no '='")
            path = _resolve_path(document.value, _split(key.strip()))
            document = document.replace(path, _read(value_text, path), file)
        except SpecError as error:
            problems += [attrs.evolve(problem, file=file, line=None) for problem in error.problems]
    if problems:
        raise SpecError(problems)
    return document


def set_value(document: Document, key: str, value: Any, file: str, line: int | None = None) -> Document:
    """A new document with a plain value at `key.path`, which errors will place at `file` and `line`.

    Raises:
        SpecError: the path leads nowhere.
    """
    try:
        return document.replace(_resolve_path(document.value, _split(key)), value, file, line)
    except SpecError as error:
        raise SpecError([attrs.evolve(problem, file=file, line=line) for problem in error.problems]) from error


def _split(key: str) -> list[str | int]:
    """`phases[0].every` as `["phases", 0, "every"]`; a number after a dot stays a string, as it may be a key."""
    if not key:
        raise _error("expected a key before '=', found nothing")
    steps: list[str | int] = []
    for position, part in enumerate(key.split(".")):
        match = _PART.fullmatch(part)
        if match is None:
            raise _error(f"cannot read {part!r} in the key", "write key.path, key.0.path or key[0].path")
        name, brackets = match.groups()
        if name:
            steps.append(name)
        elif position or not brackets:
            raise _error(f"the key {key!r} has an empty part", "remove the extra dot")
        steps += [int(index) if _is_index(index) else index for index in brackets[1:-1].split("][") if brackets]
    return steps


def _resolve_path(value: Any, steps: Sequence[str | int]) -> KeyPath:
    """The steps with names of list items and numbers after a dot turned into indices."""
    path: KeyPath = ()
    for step in steps:
        if isinstance(step, str) and isinstance(value, list):
            step = int(step) if _is_index(step) else _index_of(value, step, path)
        elif isinstance(step, str) and value is None and _is_index(step):
            step = int(step)
        path = (*path, step)
        if isinstance(value, dict):
            value = value.get(step)
        else:
            value = value[step] if isinstance(value, list) and isinstance(step, int) and step < len(value) else None
    return path


def _read(text: str, path: KeyPath) -> Any:
    try:
        return parse_value(text, "override")
    except SpecError as error:
        raise SpecError(problem.under(*path) for problem in error.problems) from error


def _index_of(items: list[Any], name: str, path: KeyPath) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if names.count(name) == 1:
        return names.index(name)
    if name in names:
        raise _error(f"{names.count(name)} items are named {name!r}", "address one by its index", path)
    hint = did_you_mean(name, (known for known in names if isinstance(known, str)))
    raise _error(f"no item is named {name!r}", hint or "address it by its index", path)


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _error(message: str, hint: str | None = None, path: KeyPath = ()) -> SpecError:
    return SpecError([Problem(path=path, message=message, hint=hint)])
