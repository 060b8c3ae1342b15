"""Options that name one of several things: `digits`, or `{use: pixel_unshuffle, with: {factor: 2}}`."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import attrs

from sftk.core.options import describe, describe_value, matches
from sftk.errors import DataError, did_you_mean

Choice = str | dict[str, Any]
"""What a recipe writes: a name, or a mapping of `use` and `with`."""
FilePath = Annotated[str, "file"]
"""The annotation of an option that names a file or folder to read: it is found as specs and weights are."""
Finding = tuple[tuple[str, ...], str, str | None]
"""Where something is wrong, what, and the hint."""


def options_of(make: Callable[..., Any], given: Sequence[str] = ()) -> dict[str, Any]:
    """Options of a class or function, with their annotations; `given` are arguments that the caller provides.

    Example:
        >>> def clips(frames: int, size: int = 3): ...
        >>> options_of(clips, given=("frames",))
        {'size': <class 'int'>}
    """
    hints = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)
    return {name: hints.get(name, Any) for name in inspect.signature(make).parameters if name not in given}


def file_options(make: Callable[..., Any]) -> tuple[str, ...]:
    """Options of a class or function that name files, those annotated with `FilePath`.

    Example:
        >>> def clips(path: FilePath, captions: FilePath | None = None, size: int = 3): ...
        >>> file_options(clips)
        ('path', 'captions')
    """
    hints = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make, include_extras=True)
    return tuple(name for name, hint in hints.items() if FilePath in (hint, *typing.get_args(hint)))


def required_of(make: Callable[..., Any], given: Sequence[str] = ()) -> tuple[str, ...]:
    """Options without a default.

    Example:
        >>> def clips(frames: int, path: str, size: int = 3): ...
        >>> required_of(clips, given=("frames",))
        ('path',)
    """
    parameters = inspect.signature(make).parameters
    return tuple(name for name, one in parameters.items() if one.default is inspect.Parameter.empty and name not in given)


def option_findings(
    owner: str, make: Callable[..., Any], values: Mapping[str, Any], given: Sequence[str] = ()
) -> Iterator[Finding]:
    """What is wrong with the options of a class or function: unknown, missing and of another type.

    An option annotated with an attrs class takes a mapping of its fields.

    Example:
        >>> def clips(frames: int, size: int = 3): ...
        >>> list(option_findings("clips", clips, {"sise": 4}, given=("frames",)))
        [(('sise',), "clips has no option 'sise'", "did you mean 'size'?")]
    """
    options = options_of(make, given)
    for key, value in values.items():
        if key not in options:
            yield (key,), f"{owner} has no option {key!r}", did_you_mean(key, options)
            continue
        inner = section_class(options[key])
        if inner is not None and isinstance(value, Mapping):
            for path, message, hint in option_findings(key, inner, value):
                yield (key, *path), message, hint
        elif not matches(value, options[key]):
            wanted = "a mapping" if inner is not None else describe(options[key])
            yield (key,), f"the option {key!r} of {owner} takes {wanted}, found {describe_value(value)}", None
    for key in required_of(make, given):
        if key not in values:
            yield (), f"{owner} needs the option {key!r}", f"add {key}: ..."


def section_class(annotation: Any) -> type | None:
    """The attrs class in an annotation `Section` or `Section | None`, else None."""
    members = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return next((member for member in members if isinstance(member, type) and attrs.has(member)), None)


def with_sections(make: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options with each mapping that stands for an attrs class made into one.

    Raises:
        DataError: a class refuses its values.

    Example:
        >>> @attrs.frozen(kw_only=True)
        ... class Solver:
        ...     steps: int = 50
        >>> def pairs(solver: Solver): ...
        >>> with_sections(pairs, {"solver": {"steps": 4}})
        {'solver': Solver(steps=4)}
    """
    options, made = options_of(make), dict(values)
    for key, value in values.items():
        inner = section_class(options.get(key))
        if inner is not None and isinstance(value, Mapping):
            made[key] = call(key, inner, value)
    return made


def call(owner: str, make: Callable[..., Any], values: Mapping[str, Any], **given: Any) -> Any:
    """Calls a class or function with options from a recipe.

    Raises:
        DataError: an option is unknown, missing or refused; every problem is listed.
    """
    problems = [_sentence(finding) for finding in option_findings(owner, make, values, tuple(given))]
    if problems:
        raise DataError("\n".join(problems))
    try:
        return make(**given, **with_sections(make, values))
    except (TypeError, ValueError) as error:
        raise DataError(f"{owner} cannot be made with {dict(values)}: {error}") from error


def choice_findings(kind: str, registry: Mapping[str, Callable[..., Any]], choice: Choice) -> Iterator[Finding]:
    """What is wrong with a choice.

    Example:
        >>> [message for _, message, _ in choice_findings("codec", {"digits": dict}, "digitz")]
        ["unknown codec 'digitz'"]
    """
    name, values = split_choice(choice)
    if isinstance(choice, Mapping):
        for key in choice:
            if key not in ("use", "with"):
                yield (key,), f"a {kind} has no key {key!r}", "expected `use` and `with`"
    if name not in registry:
        yield (("use",) if isinstance(choice, Mapping) else ()), f"unknown {kind} {name!r}", did_you_mean(str(name), registry)
        return
    for path, message, hint in option_findings(str(name), registry[str(name)], values):
        yield ("with", *path), message, hint


def make_choice(kind: str, registry: Mapping[str, Callable[..., Any]], choice: Choice) -> Any:
    """What a choice names, made with its options.

    Raises:
        DataError: it is unknown, or its options are wrong.
    """
    problems = [_sentence(finding) for finding in choice_findings(kind, registry, choice)]
    if problems:
        raise DataError("\n".join(problems))
    name, values = split_choice(choice)
    return call(str(name), registry[str(name)], values)


def split_choice(choice: Choice) -> tuple[Any, dict[str, Any]]:
    """A choice's name and options.

    Example:
        >>> split_choice("digits"), split_choice({"use": "random", "with": {"size": 3}})
        (('digits', {}), ('random', {'size': 3}))
    """
    return (choice, {}) if isinstance(choice, str) else (choice.get("use"), dict(choice.get("with") or {}))


def _sentence(finding: Finding) -> str:
    path, message, hint = finding
    return f"{message} @ {'.'.join(path)}" * bool(path) + message * (not path) + (f"; {hint}" if hint else "")
