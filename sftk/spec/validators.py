"""Validators of attrs fields that several sections of a recipe share."""

from __future__ import annotations

from typing import Any


def at_least(least: float):
    """An attrs validator: a number (or every one of a tuple) is at least `least`; None and words pass.

    Example:
        >>> import attrs
        >>> @attrs.frozen
        ... class Batch:
        ...     size: int = attrs.field(validator=at_least(1))
        >>> Batch(0)
        Traceback (most recent call last):
        ValueError: size must be at least 1, found 0
    """

    def check(instance: Any, attribute: Any, value: Any) -> None:
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not isinstance(number, str) and number < least:
                raise ValueError(f"{attribute.name.rstrip('_')} must be at least {least:g}, found {number}")

    return check
