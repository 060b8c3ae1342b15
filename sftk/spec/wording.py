"""Values, types and numbers of things in plain words, for messages."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args

import attrs

from sftk.spec.annotations import MAPPINGS, SEQUENCES, bare, origin_of
from sftk.spec.scalars import number_text

_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "a boolean", type(None): "null"}


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


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things.

    Example:
        >>> counted(1, "rank"), counted(2, "rank"), counted(8, "pass", "passes")
        ('1 rank', '2 ranks', '8 passes')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def passes(per_rank: int, accumulation: int, sequence: int) -> str:
    """How a batch is split.

    Args:
        per_rank: samples of one forward pass on one rank.
        accumulation: forward passes of one update.
        sequence: ranks that share a sample.

    Example:
        >>> passes(1, 8, sequence=2)
        '1 sample in a pass, 8 passes an update, 2 ranks share each sample'
    """
    shared = f", {sequence} ranks share each sample" if sequence > 1 else ""
    return f"{counted(per_rank, 'sample')} in a pass, {counted(accumulation, 'pass', 'passes')} an update{shared}"


def expected(kind: Any) -> str:
    """A type in plain words.

    Example:
        >>> expected(float | None), expected(Literal["auto", "off"])
        ('a number or null', 'one of "auto", "off"')
    """
    kind, origin = bare(kind), origin_of(kind)
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(expected(member) for member in get_args(kind)))
        return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
    if origin is Literal:
        options = [f'"{option}"' if isinstance(option, str) else describe(option).split(" ")[-1] for option in get_args(kind)]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    if origin in SEQUENCES:
        return "a list"
    if origin in MAPPINGS or (isinstance(kind, type) and attrs.has(kind)):
        return "a mapping"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def choices(kind: Any) -> list[Any]:
    """The values that a type's literals name.

    Example:
        >>> choices(Literal["auto"] | float)
        ['auto']
    """
    kind, origin = bare(kind), origin_of(kind)
    if origin is Literal:
        return list(get_args(kind))
    if origin in (Union, types.UnionType):
        return [option for member in get_args(kind) for option in choices(member)]
    return []
