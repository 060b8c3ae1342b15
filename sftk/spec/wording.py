"""Found values in plain words, for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftk.spec.scalars import number_text


def describe(value: Any) -> str:
    """A found value in plain words, for an error message.

    Example:
        >>> describe("3"), describe(3), describe(True), describe(None), describe([1])
        ('the string "3"', 'the integer 3', 'the boolean true', 'null', 'a list')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the {'integer' if isinstance(value, int) else 'number'} {number_text(value)}"
    if isinstance(value, str):
        return f'the string "{value if len(value) <= 60 else value[:57] + "..."}"'
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"
