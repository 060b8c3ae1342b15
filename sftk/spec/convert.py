"""Plain values into attrs classes, strictly: nothing is converted silently and every problem is reported with its place."""

from __future__ import annotations

import copy
import types
from collections import abc
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.errors import AttributeValidationNote, BaseValidationError, ForbiddenExtraKeysError, IterableValidationNote

from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.document import Document, KeyPath
from sftk.spec.wording import describe

T = TypeVar("T")

_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "a boolean", type(None): "null"}
_SEQUENCES: dict[Any, Callable[[list[Any]], Any]] = {
    **dict.fromkeys((tuple, abc.Sequence, abc.Collection, abc.Iterable), tuple),
    list: list,
    set: set,
    abc.Set: frozenset,
    frozenset: frozenset,
}
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


@attrs.frozen
class _Finding:
    """A problem, and the path whose place it is shown at (that of the key when `problem.path` is the mapping's)."""

    problem: Problem
    place: KeyPath = ()
    without: KeyPath | Literal["nothing"] | None = None
    """The key without which the rest can be read; None while it is not known, "nothing" when there is none."""

    def under(self, *prefix: str | int) -> _Finding:
        without = self.without if self.without in (None, "nothing") else (*prefix, *self.without)
        return _Finding(self.problem.under(*prefix), (*prefix, *self.place), without)

    def stays(self) -> _Finding:
        return self if self.without is not None else attrs.evolve(self, without="nothing")


class _InvalidValue(ValueError):
    def __init__(self, findings: list[_Finding]):
        super().__init__("; ".join(finding.problem.message for finding in findings))
        self.findings = findings


_CAUSED_BY_USER = (ValueError, TypeError, OverflowError, BaseValidationError, SpecError)


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
    except _CAUSED_BY_USER as error:
        findings = _findings(error)
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
    except _CAUSED_BY_USER as error:
        wrong = {finding.without for finding in _findings(error)}
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
    except _CAUSED_BY_USER:
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
        return {_key(field): unstructure(getattr(value, field.name)) for field in attrs.fields(type(value)) if field.init}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: unstructure(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(unstructure(item) for item in value)
    return [unstructure(item) for item in value] if isinstance(value, list | tuple) else value


def make_converter() -> Converter:
    """A cattrs converter with the strict hooks that `structure` uses, to which a caller can add hooks for classes.

    Returns:
        A new converter. A hook of the caller reports what is wrong by raising ValueError with the message.

    Example:
        >>> make_converter().structure([1, 2], tuple[float, ...])
        (1.0, 2.0)
    """
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)

    def register(accepts: Callable[[Any], bool], hook: Callable[[Converter, Any, Any], Any]) -> None:
        converter.register_structure_hook_func(accepts, lambda value, kind: hook(converter, value, kind))

    for kind in (bool, int, float, str, Enum):
        converter.register_structure_hook(kind, _scalar)
    register(lambda kind: _origin(kind) in _SEQUENCES, _sequence)
    register(lambda kind: _origin(kind) in _MAPPINGS, _mapping)
    register(lambda kind: _origin(kind) is Literal, _literal)
    register(lambda kind: _origin(kind) in (Union, types.UnionType), _union)
    register(lambda kind: isinstance(kind, type) and attrs.has(kind), _instance)
    register(lambda kind: kind in (None, type(None)), lambda _, value, kind: _check(value is None, kind, value))
    return converter


def _scalar(value: Any, kind: Any) -> Any:
    if issubclass(kind, Enum):
        return _enum(value, kind)
    _check(type(value) is kind or (kind is float and type(value) is int), kind, value)
    return float(value) if kind is float else value


def _enum(value: Any, kind: Any) -> Any:
    members = {(type(member.value), member.value): member for member in kind}
    key = (type(value), value if isinstance(value, abc.Hashable) else None)
    _check(key in members, cast(Any, Literal)[tuple(member.value for member in kind)], value)
    return members[key]


def _literal(_: Any, value: Any, kind: Any) -> Any:
    _check(any(type(value) is type(option) and value == option for option in get_args(kind)), kind, value)
    return value


def _sequence(converter: Converter, value: Any, kind: Any) -> Any:
    _check(isinstance(value, list), kind, value)
    items = get_args(kind)
    if _origin(kind) is not tuple or not items or items[-1] is Ellipsis:
        items = (items[0] if items else Any,) * len(value)
    if len(items) != len(value):
        sizes = [f"a list of {size} item{'s' * (size != 1)}" for size in (len(items), len(value))]
        raise _invalid(f"expected {sizes[0]}, found {sizes[1]}")
    findings: list[_Finding] = []
    done = [
        _part(converter, item, part, (index,), findings) for index, (item, part) in enumerate(zip(value, items, strict=True))
    ]
    if findings:
        raise _InvalidValue(findings)
    return _SEQUENCES[_origin(kind)](done)


def _mapping(converter: Converter, value: Any, kind: Any) -> Any:
    _check(isinstance(value, Mapping), kind, value)
    key_kind, item_kind = get_args(kind) or (Any, Any)
    findings: list[_Finding] = []
    done = {
        _part(converter, key, key_kind, (), findings, (key,)): _part(converter, item, item_kind, (key,), findings)
        for key, item in value.items()
    }
    if findings:
        raise _InvalidValue([finding.stays() for finding in findings])
    return done


def _union(converter: Converter, value: Any, kind: Any) -> Any:
    """The member of the value's own python type; of several (two classes, say), the first without or with fewest problems."""
    fitting = [member for member in get_args(kind) if _fits(value, member)]
    _check(bool(fitting), kind, value)
    failures: list[list[_Finding]] = []
    for member in sorted(fitting, key=lambda member: _bare(member) is float and type(value) is int):
        findings: list[_Finding] = []
        done = _part(converter, value, member, (), findings)
        if not findings:
            return done
        failures.append(findings)
    raise _InvalidValue(min(failures, key=len))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value could be of this type, judged by its python type alone."""
    kind, origin = _bare(kind), _origin(kind)
    if kind is Any or kind is object:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(kind))
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(kind))
    if isinstance(value, list):
        return origin in _SEQUENCES
    if isinstance(value, Mapping):
        return origin in _MAPPINGS or (isinstance(kind, type) and attrs.has(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return any(type(value) is type(member.value) and value == member.value for member in kind)
    return type(value) is kind or (kind is float and type(value) is int)


def _instance(converter: Converter, value: Any, cls: Any) -> Any:
    _check(isinstance(value, Mapping), cls, value)
    attrs.resolve_types(cls)
    fields = {_key(field): field for field in attrs.fields(cls) if field.init}
    findings = [
        _Finding(Problem(message=f"unknown key {key!r}", hint=did_you_mean(str(key), fields)), (key,), (key,))
        for key in value
        if key not in fields
    ]
    done: dict[str, Any] = {}
    for key, field in fields.items():
        if key in value:
            before = len(findings)
            part = _part(converter, value[key], Any if field.type is None else field.type, (key,), findings)
            if len(findings) == before:
                done[key] = part
        elif field.default is attrs.NOTHING:
            findings.append(_Finding(Problem(message=f"missing key {key!r}"), without="nothing"))
    if not findings:
        try:
            return cls(**{fields[key].alias: part for key, part in done.items()})
        except _CAUSED_BY_USER as error:
            findings = _refusals(cls, fields, done) or [finding.stays() for finding in _findings(error)]
            raise _InvalidValue([_droppable(finding, fields) for finding in findings]) from error
    raise _InvalidValue([_droppable(finding, fields) for finding in findings + _refusals(cls, fields, done)])


def _droppable(finding: _Finding, fields: Mapping[str, Any]) -> _Finding:
    """The finding with the field that it is about as what can be left out, if that has a default."""
    if finding.without is not None or not finding.place:
        return finding
    key = finding.place[0]
    default = isinstance(key, str) and key in fields and fields[key].default is not attrs.NOTHING
    return attrs.evolve(finding, without=(key,) if default else None)


def _refusals(cls: Any, fields: Mapping[str, Any], done: Mapping[str, Any]) -> list[_Finding]:
    """What the fields' converters and validators have against the values, all of it: `cls()` stops at the first."""
    findings: list[_Finding] = []
    probe = object.__new__(cls)
    for key, value in done.items():
        field, convert = fields[key], fields[key].converter
        extra = (probe, field) if isinstance(field.converter, attrs.Converter) else ()
        try:
            object.__setattr__(probe, field.name, convert(value, *extra) if convert else value)
        except _CAUSED_BY_USER as error:
            findings += [finding.under(key) for finding in _findings(error)]
    for key in done:
        field = fields[key]
        if field.validator is not None and hasattr(probe, field.name):
            try:
                field.validator(probe, field, getattr(probe, field.name))
            except _CAUSED_BY_USER as error:
                findings += [finding.under(key) for finding in _findings(error)]
            except AttributeError:
                continue  # it reads another field, which is missing here
    return findings


def _part(
    converter: Converter, value: Any, kind: Any, at: KeyPath, findings: list[_Finding], place: KeyPath | None = None
) -> Any:
    """One part converted; when that fails, None, and what is wrong is added to `findings`."""
    try:
        return converter.structure(value, _bare(kind))
    except _CAUSED_BY_USER as error:
        found = [finding.under(*at) for finding in _findings(error)]
        findings += found if place is None else [_Finding(finding.problem, place) for finding in found]


def _findings(error: BaseException) -> list[_Finding]:
    """The problems in an error of ours, of cattrs' own hooks, or of a hook or a validator that a caller wrote."""
    if isinstance(error, _InvalidValue):
        return error.findings
    if isinstance(error, SpecError):
        return [_Finding(problem, problem.path) for problem in error.problems]
    if isinstance(error, ForbiddenExtraKeysError):
        return [_Finding(Problem(message=f"unknown key {key!r}"), (key,)) for key in sorted(error.extra_fields)]
    if isinstance(error, BaseValidationError):
        return [finding.under(*_noted(part)) for part in error.exceptions for finding in _findings(part)]
    if isinstance(error, KeyError):
        return [_Finding(Problem(message=f"missing key {error.args[0]!r}"))]
    message = str(error.args[0]) if error.args else type(error).__name__
    return [_Finding(Problem(message=message))]


def _noted(error: BaseException) -> KeyPath:
    """Where cattrs says that a part of its error happened; a missing key is one of the mapping itself."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, IterableValidationNote):
            return (note.index,)
        if isinstance(note, AttributeValidationNote) and not isinstance(error, KeyError):
            return (note.name,)
    return ()


def _check(ok: bool, kind: Any, value: Any) -> None:
    if ok:
        return
    hint = None
    options = [option for option in _options(kind) if isinstance(option, str)]
    if isinstance(value, str) and (guess := did_you_mean(value, options)) and guess.startswith("did you mean"):
        hint = guess
    raise _InvalidValue([_Finding(Problem(message=f"expected {_expected(kind)}, found {describe(value)}", hint=hint))])


def _invalid(message: str) -> _InvalidValue:
    return _InvalidValue([_Finding(Problem(message=message))])


def _options(kind: Any) -> list[Any]:
    kind, origin = _bare(kind), _origin(kind)
    if origin is Literal:
        return list(get_args(kind))
    if origin in (Union, types.UnionType):
        return [option for member in get_args(kind) for option in _options(member)]
    return []


def _expected(kind: Any) -> str:
    """A type in plain words."""
    kind, origin = _bare(kind), _origin(kind)
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(_expected(member) for member in get_args(kind)))
        return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
    if origin is Literal:
        options = [f'"{option}"' if isinstance(option, str) else describe(option).split(" ")[-1] for option in get_args(kind)]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    if origin in _SEQUENCES:
        return "a list"
    if origin in _MAPPINGS or (isinstance(kind, type) and attrs.has(kind)):
        return "a mapping"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _key(field: Any) -> str:
    return field.alias.removesuffix("_")


def _bare(kind: Any) -> Any:
    """The type without `Annotated` and the names of `NewType` and `type` statements."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif hasattr(kind, "__supertype__") or type(kind).__name__ == "TypeAliasType":
            kind = getattr(kind, "__supertype__", None) or kind.__value__
        else:
            return kind


def _origin(kind: Any) -> Any:
    kind = _bare(kind)
    return get_origin(kind) or kind
