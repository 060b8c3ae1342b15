"""Annotations of fields, taken apart: what lies under aliases, which are lists and mappings, which key a field reads."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

SEQUENCES: dict[Any, Callable[[list[Any]], Any]] = {
    **dict.fromkeys((tuple, abc.Sequence, abc.Collection, abc.Iterable), tuple),
    list: list,
    set: set,
    abc.Set: frozenset,
    frozenset: frozenset,
}
"""Types that a list stands for, and what makes one of theirs from it."""
MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
"""Types that a mapping stands for."""


def bare(kind: Any) -> Any:
    """The type without `Annotated` and the names of `NewType` and `type` statements.

    Example:
        >>> bare(Annotated[int, "frames"])
        <class 'int'>
    """
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif hasattr(kind, "__supertype__") or type(kind).__name__ == "TypeAliasType":
            kind = getattr(kind, "__supertype__", None) or kind.__value__
        else:
            return kind


def origin_of(kind: Any) -> Any:
    """The type without its arguments.

    Example:
        >>> origin_of(tuple[int, ...]), origin_of(int)
        (<class 'tuple'>, <class 'int'>)
    """
    kind = bare(kind)
    return get_origin(kind) or kind


def key_of(field: Any) -> str:
    """The key that a field of an attrs class reads: its name, without an underscore at the end.

    Example:
        >>> import attrs
        >>> @attrs.frozen(kw_only=True)
        ... class Step:
        ...     with_: dict
        >>> key_of(attrs.fields(Step).with_)
        'with'
    """
    return field.alias.removesuffix("_")
