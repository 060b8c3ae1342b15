"""The strict hooks of a cattrs converter: one for each kind of type, all of which report every problem."""

from __future__ import annotations

import types
from collections import abc
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, cast, get_args

import attrs
from cattrs import Converter

from sftk.errors import Problem, did_you_mean
from sftk.spec.annotations import MAPPINGS, SEQUENCES, bare, key_of, origin_of
from sftk.spec.document import KeyPath
from sftk.spec.findings import CAUSED_BY_USER, Finding, InvalidValue, findings_of
from sftk.spec.wording import choices, counted, describe, expected


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
    register(lambda kind: origin_of(kind) in SEQUENCES, _sequence)
    register(lambda kind: origin_of(kind) in MAPPINGS, _mapping)
    register(lambda kind: origin_of(kind) is Literal, _literal)
    register(lambda kind: origin_of(kind) in (Union, types.UnionType), _union)
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
    if origin_of(kind) is not tuple or not items or items[-1] is Ellipsis:
        items = (items[0] if items else Any,) * len(value)
    if len(items) != len(value):
        sizes = [f"a list of {counted(size, 'item')}" for size in (len(items), len(value))]
        raise _invalid(f"expected {sizes[0]}, found {sizes[1]}")
    findings: list[Finding] = []
    done = [
        _part(converter, item, part, (index,), findings) for index, (item, part) in enumerate(zip(value, items, strict=True))
    ]
    if findings:
        raise InvalidValue(findings)
    return SEQUENCES[origin_of(kind)](done)


def _mapping(converter: Converter, value: Any, kind: Any) -> Any:
    _check(isinstance(value, Mapping), kind, value)
    key_kind, item_kind = get_args(kind) or (Any, Any)
    findings: list[Finding] = []
    done = {
        _part(converter, key, key_kind, (), findings, (key,)): _part(converter, item, item_kind, (key,), findings)
        for key, item in value.items()
    }
    if findings:
        raise InvalidValue([finding.stays() for finding in findings])
    return done


def _union(converter: Converter, value: Any, kind: Any) -> Any:
    """The member of the value's own python type; of several classes the one that a tag of theirs names, otherwise the first
    without or with fewest problems."""
    fitting = [member for member in get_args(kind) if _fits(value, member)]
    _check(bool(fitting), kind, value)
    fitting = _tagged(fitting, value)
    failures: list[list[Finding]] = []
    for member in sorted(fitting, key=lambda member: bare(member) is float and type(value) is int):
        findings: list[Finding] = []
        done = _part(converter, value, member, (), findings)
        if not findings:
            return done
        failures.append(findings)
    raise InvalidValue(min(failures, key=len))


def _tagged(kinds: list[Any], value: Any) -> list[Any]:
    """Of several classes that a literal field tells apart, those whose literal is the value's or, left out, the default."""
    if len(kinds) < 2 or not all(isinstance(kind, type) and attrs.has(kind) for kind in kinds):
        return kinds
    literals = [
        {key_of(field): field for field in attrs.fields(attrs.resolve_types(kind)) if origin_of(field.type) is Literal}
        for kind in kinds
    ]
    for key in [key for key in literals[0] if all(key in fields for fields in literals)]:
        tags = [get_args(bare(fields[key].type)) for fields in literals]
        if len(set(sum(tags, ()))) < sum(map(len, tags)):  # an option that they have in common
            continue
        try:
            _check(key not in value or value[key] in sum(tags, ()), Literal[sum(tags, ())], value.get(key))
        except InvalidValue as error:
            raise InvalidValue([_droppable(f.under(key), literals[0]) for f in error.findings]) from None
        named = [value.get(key, fields[key].default) in tag for fields, tag in zip(literals, tags, strict=True)]
        return [kind for kind, fits in zip(kinds, named, strict=True) if fits] or kinds
    return kinds


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value could be of this type, judged by its python type alone."""
    kind, origin = bare(kind), origin_of(kind)
    if kind is Any or kind is object:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(kind))
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(kind))
    if isinstance(value, list):
        return origin in SEQUENCES
    if isinstance(value, Mapping):
        return origin in MAPPINGS or (isinstance(kind, type) and attrs.has(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return any(type(value) is type(member.value) and value == member.value for member in kind)
    return type(value) is kind or (kind is float and type(value) is int)


def _instance(converter: Converter, value: Any, cls: Any) -> Any:
    _check(isinstance(value, Mapping), cls, value)
    attrs.resolve_types(cls)
    fields = {key_of(field): field for field in attrs.fields(cls) if field.init}
    findings = [
        Finding(Problem(message=f"unknown key {key!r}", hint=did_you_mean(str(key), fields)), (key,), (key,))
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
            findings.append(Finding(Problem(message=f"missing key {key!r}"), without="nothing"))
    if not findings:
        try:
            return cls(**{fields[key].alias: part for key, part in done.items()})
        except CAUSED_BY_USER as error:
            findings = _refusals(cls, fields, done) or [finding.stays() for finding in findings_of(error)]
            raise InvalidValue([_droppable(finding, fields) for finding in findings]) from error
    raise InvalidValue([_droppable(finding, fields) for finding in findings + _refusals(cls, fields, done)])


def _droppable(finding: Finding, fields: Mapping[str, Any]) -> Finding:
    """The finding with the field that it is about as what can be left out, if that has a default."""
    if finding.without is not None or not finding.place:
        return finding
    key = finding.place[0]
    default = isinstance(key, str) and key in fields and fields[key].default is not attrs.NOTHING
    return attrs.evolve(finding, without=(key,) if default else None)


def _refusals(cls: Any, fields: Mapping[str, Any], done: Mapping[str, Any]) -> list[Finding]:
    """What the fields' converters and validators have against the values, all of it: `cls()` stops at the first."""
    findings: list[Finding] = []
    probe = object.__new__(cls)
    for key, value in done.items():
        field, convert = fields[key], fields[key].converter
        extra = (probe, field) if isinstance(field.converter, attrs.Converter) else ()
        try:
            object.__setattr__(probe, field.name, convert(value, *extra) if convert else value)
        except CAUSED_BY_USER as error:
            findings += [finding.under(key) for finding in findings_of(error)]
    for key in done:
        field = fields[key]
        if field.validator is not None and hasattr(probe, field.name):
            try:
                field.validator(probe, field, getattr(probe, field.name))
            except CAUSED_BY_USER as error:
                findings += [finding.under(key) for finding in findings_of(error)]
            except AttributeError:
                continue  # it reads another field, which is missing here
    return findings


def _part(
    converter: Converter, value: Any, kind: Any, at: KeyPath, findings: list[Finding], place: KeyPath | None = None
) -> Any:
    """One part converted; when that fails, None, and what is wrong is added to `findings`."""
    try:
        return converter.structure(value, bare(kind))
    except CAUSED_BY_USER as error:
        found = [finding.under(*at) for finding in findings_of(error)]
        findings += found if place is None else [Finding(finding.problem, place) for finding in found]


def _check(ok: bool, kind: Any, value: Any) -> None:
    if ok:
        return
    hint = None
    options = [option for option in choices(kind) if isinstance(option, str)]
    if isinstance(value, str) and (guess := did_you_mean(value, options)) and guess.startswith("did you mean"):
        hint = guess
    raise InvalidValue([Finding(Problem(message=f"expected {expected(kind)}, found {describe(value)}", hint=hint))])


def _invalid(message: str) -> InvalidValue:
    return InvalidValue([Finding(Problem(message=message))])
