"""Checks an option's value against the annotation of the function that takes it."""

from __future__ import annotations

import functools
import types
import typing
from typing import Any, Literal, get_args, get_origin

from sftk.core.transform import FunctionTransform


def option_problem(op: FunctionTransform, name: str, value: Any) -> str | None:
    """What is wrong with an option's value, or None.

    Example:
        >>> from sftk.functional import add_noise
        >>> option_problem(add_noise, "shift", "5")
        "the option 'shift' of add_noise takes a number, found the string '5'"
    """
    annotation = _annotations(op).get(name, Any)
    if matches(value, annotation):
        return None
    return f"the option {name!r} of {op.name} takes {describe(annotation)}, found {describe_value(value)}"


@functools.cache
def _annotations(op: FunctionTransform) -> dict[str, Any]:
    return typing.get_type_hints(op.fn)


def matches(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type, without conversion but for int to float and list to tuple."""
    if annotation is Any:
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, member) for member in arguments)
    if origin is Literal:
        return any(value == member and type(value) is type(member) for member in arguments)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool):
        return isinstance(value, annotation)
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        return _matches_sequence(value, arguments)
    if isinstance(origin, type) and issubclass(origin, typing.Mapping):
        return isinstance(value, typing.Mapping)
    return isinstance(value, origin or annotation)


def _matches_sequence(value: Any, arguments: tuple[Any, ...]) -> bool:
    if not isinstance(value, (tuple, list)):
        return False
    if not arguments:
        return True
    if len(arguments) == 1 or arguments[-1] is Ellipsis:
        return all(matches(member, arguments[0]) for member in value)
    return len(value) == len(arguments) and all(map(matches, value, arguments))


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    None: "null",
    type(None): "null",
}


def describe(annotation: Any) -> str:
    """An annotation in a user's words.

    Example:
        >>> describe(tuple[float, ...] | None)
        'a list of numbers or null'
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(member) for member in arguments)
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        plural = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}
        if not arguments:
            return "a list"
        first, *others = arguments
        members = plural.get(first, "values")
        return f"a list of {len(arguments)} {members}" if others and others[-1] is not Ellipsis else f"a list of {members}"
    if isinstance(origin, type) and issubclass(origin, typing.Mapping):
        return "a mapping"
    return getattr(annotation, "__name__", str(annotation))


def describe_value(value: Any) -> str:
    """A value with its type in a user's words.

    Example:
        >>> describe_value("5"), describe_value(None), describe_value([1])
        ("the string '5'", 'null', 'the list [1]')
    """
    if value is None:
        return "null"
    kinds = {
        bool: "the boolean",
        int: "the integer",
        float: "the number",
        str: "the string",
        list: "the list",
        tuple: "the list",
        dict: "the mapping",
    }
    text = str(value).lower() if isinstance(value, bool) else repr(list(value) if isinstance(value, tuple) else value)
    return f"{kinds.get(type(value), 'the ' + type(value).__name__)} {text[:80]}"
