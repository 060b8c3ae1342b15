"""Validators of attrs fields that several sections of a recipe share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from sftk.spec.scalars import number_text

PLAIN_NAME = re.compile(r"[\w-]+", re.ASCII)
"""What phases, stages, roles and variants may be called: they become file names, metric names and parts of overrides."""


def plain_name(instance: Any, attribute: Any, value: str) -> None:
    """An attrs validator: a `PLAIN_NAME`.

    Raises:
        ValueError: it is none.
    """
    if not PLAIN_NAME.fullmatch(value):
        raise ValueError(f"a name is made of letters, digits, '-' and '_', found {value!r}")


def at_least(least: float):
    """An attrs validator: a number (or every one of a tuple) is finite and at least `least`; None and words pass.

    Example:
        >>> import attrs
        >>> @attrs.frozen
        ... class Batch:
        ...     size: int = attrs.field(validator=at_least(1))
        >>> Batch(0)
        Traceback (most recent call last):
        ValueError: size must be at least 1, found 0
    """

    return _bounds(lambda number: number >= least, f"at least {number_text(least)}")


def above(bound: float):
    """As `at_least`, but the bound itself is refused.

    Example:
        >>> import attrs
        >>> @attrs.frozen
        ... class Phase:
        ...     clip: float | None = attrs.field(default=None, validator=above(0))
        >>> Phase(0.0)
        Traceback (most recent call last):
        ValueError: clip must be greater than 0, found 0.0
    """
    return _bounds(lambda number: number > bound, f"greater than {number_text(bound)}")


def within(least: float, end: float):
    """As `at_least`, but the number is also less than `end`.

    Example:
        >>> import attrs
        >>> @attrs.frozen
        ... class Optimizer:
        ...     betas: tuple[float, float] = attrs.field(validator=within(0, 1))
        >>> Optimizer((0.9, 1.0))
        Traceback (most recent call last):
        ValueError: betas must be at least 0 and less than 1, found 1.0
    """
    return _bounds(lambda number: least <= number < end, f"at least {number_text(least)} and less than {number_text(end)}")


def _bounds(holds: Callable[[float], bool], words: str):
    def check(instance: Any, attribute: Any, value: Any) -> None:
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or isinstance(number, str):
                continue
            name = attribute.name.rstrip("_")
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, found {number_text(number)}")
            if not holds(number):
                raise ValueError(f"{name} must be {words}, found {number}")

    return check
