"""Plain values into attrs classes, strictly: nothing is converted silently and every problem is reported with its place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

import attrs
from cattrs import Converter

from sftk.errors import Problem, SpecError
from sftk.spec.annotations import key_of
from sftk.spec.document import Document
from sftk.spec.findings import CAUSED_BY_USER, findings_of
from sftk.spec.hooks import make_converter

T = TypeVar("T")


def structure(document: Document, cls: type[T], converter: Converter | None = None) -> T:
    """Make an instance of an attrs class (or another type) from a document.

    Args:
        document: what was read.
        cls: an `@attrs.frozen(kw_only=True)` class. A field whose name ends in an underscore (`with_`) reads the key
            without it (`with`).
        converter: one from `make_converter`, when it has hooks of its own.

    Returns:
        The instance. Lists become tuples where the class says so, integers become floats; nothing else is converted.

    Raises:
        SpecError: with every unknown key, missing key, wrong type and refused value, each with file and line.

    Example:
        >>> from sftk.spec.source import parse_yaml
        >>> @attrs.frozen(kw_only=True)
        ... class Optimizer:
        ...     lr: float
        ...     betas: tuple[float, float] = (0.9, 0.999)
        >>> structure(parse_yaml("lr: 1e-4", "dmd.yaml"), Optimizer)
        Optimizer(lr=0.0001, betas=(0.9, 0.999))
        >>> structure(parse_yaml("lr: '3'\\nbeta: [0, 1]", "dmd.yaml"), Optimizer)
        Traceback (most recent call last):
        sftk.errors.SpecError: expected a number, found the string "3" @ $.lr (dmd.yaml:1)
        unknown key 'beta' @ $ (dmd.yaml:2); did you mean 'betas'?
    """
    try:
        return (converter or make_converter()).structure(document.value, cls)
    except CAUSED_BY_USER as error:
        findings = findings_of(error)
    problems = []
    for finding in findings:
        file, line = document.where(finding.place)
        known = finding.problem.file is not None
        problems.append(finding.problem if known else attrs.evolve(finding.problem, file=file, line=line))
    raise SpecError(sorted(problems, key=lambda problem: (problem.file or "", problem.line or 0)))


def structure_what_fits(document: Document, cls: type[T]) -> tuple[T | None, list[Problem]]:
    """As `structure`, but goes on without the keys that are wrong, so that a later check can see the rest.

    Returns:
        The instance, or None where a wrong or missing key has no default; and every problem.

    Example:
        >>> from sftk.spec.source import parse_yaml
        >>> @attrs.frozen(kw_only=True)
        ... class Train:
        ...     steps: int
        ...     seed: int = 0
        >>> found, problems = structure_what_fits(parse_yaml("steps: 3\\nsede: 1", "dmd.yaml"), Train)
        >>> found, len(problems)
        (Train(steps=3, seed=0), 1)
    """
    try:
        return structure(document, cls), []
    except SpecError as error:
        problems = list(error.problems)
    value = copy.deepcopy(document.value)
    try:
        make_converter().structure(value, cls)
    except CAUSED_BY_USER as error:
        wrong = {finding.without for finding in findings_of(error)}
        if wrong & {None, "nothing"}:
            return None, problems
        for place in wrong:
            assert isinstance(place, tuple)
            parent = value
            for step in place[:-1]:
                parent = parent[step]
            del parent[place[-1]]
    try:
        return make_converter().structure(value, cls), problems
    except CAUSED_BY_USER:
        return None, problems


def unstructure(value: Any) -> Any:
    """The plain value of an instance: mappings, lists and scalars that `dump_yaml` writes and `structure` reads back.

    Args:
        value: an attrs instance, or a collection that may hold some.

    Returns:
        Dicts for instances and mappings, lists for tuples and sets (sorted), the value of an enum's member.

    Example:
        >>> @attrs.frozen(kw_only=True)
        ... class Window:
        ...     sizes: tuple[int, ...] = (9, 21)
        >>> unstructure({"window": Window()})
        {'window': {'sizes': [9, 21]}}
    """
    if attrs.has(type(value)):
        return {key_of(field): unstructure(getattr(value, field.name)) for field in attrs.fields(type(value)) if field.init}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: unstructure(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(unstructure(item) for item in value)
    return [unstructure(item) for item in value] if isinstance(value, list | tuple) else value
