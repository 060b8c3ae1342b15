"""YAML with places: plain values, and the file and line where each of them was written.

Reading is strict YAML 1.2 (core schema): `1e-4` is a number, `on` is a string, a repeated key is an error.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import attrs
import yaml

from sftk.errors import Problem, SpecError, did_you_mean

KeyPath = tuple[str | int, ...]
Place = tuple[str, int | None]

_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain scalar"
_MISSING = object()
_NODE_LIMIT = 300_000  # nested aliases can expand a short file without bound
_DEPTH_LIMIT = 100
_FLOW_WIDTH = 80

_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_INTEGERS = ((re.compile(r"[-+]?[0-9]+"), 10), (re.compile(r"0o[0-7]+"), 8), (re.compile(r"0x[0-9a-fA-F]+"), 16))
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CORE_TAGS = {"str": str, "int": int, "float": (int, float), "bool": bool, "null": type(None)}


@attrs.frozen(kw_only=True)
class Document:
    """A plain value (dicts, lists, scalars) and where its parts were written. Never changed: `replace` gives a new one.

    Args:
        value: what was read.
        file: the file as errors show it.
        marks: the place (file, line from 1 or None) of the key or the list item at a path.

    Example:
        >>> document = parse_yaml("phases:\\n  - name: critic\\n    every: 1", "dmd.yaml")
        >>> document.where(("phases", 0, "every", "more"))
        ('dmd.yaml', 3)
        >>> print(document.at(("phases", 0)).problem(("every",), "too often"))
        too often @ $.every (dmd.yaml:3)
    """

    value: Any
    file: str
    marks: Mapping[KeyPath, Place] = attrs.field(factory=dict, repr=False)

    def where(self, path: KeyPath) -> Place:
        """The file and line of `path`, or of its nearest ancestor that has one."""
        prefixes = (path[:length] for length in range(len(path), -1, -1))
        return next((self.marks[prefix] for prefix in prefixes if prefix in self.marks), (self.file, None))

    def locate(self, problem: Problem) -> Problem:
        """The problem with file and line of its path; one that already names a file stays as it is."""
        if problem.file is not None:
            return problem
        file, line = self.where(problem.path)
        return attrs.evolve(problem, file=file, line=line)

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """A problem at `path`, with its file and line."""
        return self.locate(Problem(path=path, message=message, hint=hint))

    def get(self, path: KeyPath, default: Any = _MISSING) -> Any:
        """The value at `path`.

        Raises:
            SpecError: there is no such path, and no `default` was given.

        Example:
            >>> parse_yaml("a: [5, 6]", "x.yaml").get(("a", 1))
            6
        """
        value: Any = self.value
        for depth, step in enumerate(path):
            in_list = isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)
            if not in_list and not (isinstance(value, dict) and step in value):
                if default is not _MISSING:
                    return default
                known = did_you_mean(str(step), value) if isinstance(value, dict) else None
                raise SpecError(
                    [self.problem(path[:depth], f"no {'item' if isinstance(step, int) else 'key'} {step!r}", known)]
                )
            value = cast(Any, value)[step]
        return value

    def at(self, path: KeyPath) -> Document:
        """The part at `path` as a document of its own: paths start there, places stay.

        Raises:
            SpecError: there is no such path.
        """
        size = len(path)
        below = {mark[size:]: place for mark, place in self.marks.items() if mark[:size] == path}
        return Document(value=self.get(path), file=self.file, marks={(): self.where(path), **below})

    def replace(self, path: KeyPath, value: Any, file: str, line: int | None = None) -> Document:
        """A new document with `value` at `path`, which errors will place at `file` and `line`. Missing mappings are made.

        Raises:
            SpecError: an index is out of range, or the path leads through a scalar.

        Example:
            >>> old = parse_yaml("a: {b: 1}", "x.yaml")
            >>> new = old.replace(("a", "b"), 2, "override")
            >>> old.value, new.value, new.where(("a", "b"))
            ({'a': {'b': 1}}, {'a': {'b': 2}}, ('override', None))
        """
        marks = {mark: place for mark, place in self.marks.items() if mark[: len(path)] != path}

        def put(node: Any, rest: KeyPath, done: KeyPath) -> Any:
            if node is None or not rest:
                marks[done] = (file, line)
            if not rest:
                return value
            step, deeper = rest[0], (*done, rest[0])
            if isinstance(step, str) and (node is None or isinstance(node, dict)):
                node = node or {}
                return {**node, step: put(node.get(step), rest[1:], deeper)}
            if isinstance(step, int) and isinstance(node, list) and 0 <= step < len(node):
                return [put(item, rest[1:], deeper) if index == step else item for index, item in enumerate(node)]
            wanted = f"a list with an item {step}" if isinstance(step, int) else f"a mapping with a key {step!r}"
            message, hint = f"expected {wanted}, found {describe(node)}", None
            if isinstance(step, int) and isinstance(node, list):
                message = f"index {step} is out of range: the list has {len(node)} item{'s' * (len(node) != 1)}"
            elif isinstance(step, int) and node is None:
                hint = "items are not added one by one: give the whole list"
            raise SpecError([Problem(path=done, message=message, hint=hint, file=file, line=line)])

        return Document(value=_copy(put(self.value, path, ())), file=self.file, marks=marks)


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
        return f"the {'integer' if isinstance(value, int) else 'number'} {_number(value)}"
    if isinstance(value, str):
        return f'the string "{value if len(value) <= 60 else value[:57] + "..."}"'
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def read_yaml(path: Path, shown_as: str | None = None) -> Document:
    """Read a YAML file.

    Args:
        path: the file.
        shown_as: its name in errors, when that is not `path`.

    Returns:
        What it holds, with places.

    Raises:
        SpecError: the file is missing, not a file, not UTF-8, or not strict YAML 1.2.

    Example:
        >>> read_yaml(Path("no/such.yaml"))
        Traceback (most recent call last):
        sftk.errors.SpecError: no such file @ $ (no/such.yaml)
    """
    file = shown_as or str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        message, hint = f"cannot read the file: {error.strerror}", None
        if isinstance(error, FileNotFoundError):
            message, hint = "no such file", did_you_mean(path.name, (near.name for near in path.parent.glob("*.y*ml")))
        elif isinstance(error, IsADirectoryError):
            message = "expected a YAML file, found a directory"
        raise SpecError([Problem(message=message, hint=hint, file=file)]) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise SpecError([Problem(message=message, hint="save the file as UTF-8", file=file, line=line)]) from error
    return parse_yaml(text, file)


def parse_yaml(text: str, file: str) -> Document:
    """Read YAML from a string.

    Args:
        text: one YAML document.
        file: its name in errors.

    Returns:
        What it holds, with places.

    Raises:
        SpecError: with every repeated key, key that is no string, tag and merge key; or with the first syntax error.

    Example:
        >>> parse_yaml("lr: 1e-4\\nswitch: on\\nstart: 012", "x.yaml").value
        {'lr': 0.0001, 'switch': 'on', 'start': 12}
        >>> parse_yaml("a: 1\\na: 2", "x.yaml")
        Traceback (most recent call last):
        sftk.errors.SpecError: duplicate key 'a' @ $ (x.yaml:2); it was given in line 1
    """
    node = _compose(text, file)
    if node is None or (node.tag == _PLAIN and not node.value):
        raise SpecError([Problem(message="the document is empty", file=file)])
    return _build(node, file)


def parse_value(text: str, file: str) -> Any:
    """Read what could stand after a key on one line: a scalar, or a list or mapping in flow style.

    Args:
        text: the value; nothing at all is null.
        file: its name in errors.

    Returns:
        The plain value.

    Raises:
        SpecError: it is not YAML, or it is more than one value.

    Example:
        >>> parse_value("{steps: [1000, 750], shift: 5.0}", "override")
        {'steps': [1000, 750], 'shift': 5.0}
    """
    node = _compose(text, file)
    body = text.strip()
    if node is None and not body:
        return None
    whole = node is not None and text[node.start_mark.index : node.end_mark.index].strip() == body
    block = (isinstance(node, yaml.CollectionNode) and not node.flow_style) or getattr(node, "style", None) in ("|", ">")
    if node is None or not whole or block:
        hint = "quote a string that holds ': ' or ' #', and write a collection as [a, b] or {a: b}"
        raise SpecError([Problem(message=f"expected one YAML value, found {body!r}", hint=hint, file=file)])
    return _build(node, file).value


def dump_yaml(value: Any) -> str:
    """Write a plain value as readable YAML that `parse_yaml` reads back as the same value (a tuple as a list).

    Args:
        value: dicts with string keys, lists, tuples, strings, numbers, booleans, None.

    Returns:
        The text, ending with a newline. Strings that YAML 1.1 or 1.2 would take for something else are quoted.

    Raises:
        TypeError: it holds something else.

    Example:
        >>> print(dump_yaml({"lr": 1e-5, "steps": [1000, 750], "phases": [{"name": "on"}]}), end="")
        lr: 1.0e-05
        steps: [1000, 750]
        phases:
          - name: 'on'
    """
    text = yaml.serialize(_node(value, flat=True), Dumper=_Dumper, allow_unicode=True, width=sys.maxsize)
    return cast(str, text).removesuffix("\n...\n").removesuffix("\n") + "\n"


@attrs.frozen
class _Alias:
    target: yaml.Node
    start_mark: yaml.Mark
    tag: str = "alias"
    value: str = "*"


class _Loader(yaml.SafeLoader):
    """Composes nodes without the types of YAML 1.1, and keeps where an alias stands."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TAG + "str"
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.ScalarEvent) and event.tag == "!":
            cast(Any, node).tag = _TAG + "str"
        return _Alias(cast(yaml.Node, node), event.start_mark) if isinstance(event, yaml.AliasEvent) else node


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _compose(text: str, file: str) -> Any:
    """The node graph of the only document in `text`; None when it has none."""

    def fail(message: str, hint: str | None = None, line: int | None = None) -> SpecError:
        return SpecError([Problem(message=message, hint=hint, file=file, line=line)])

    try:
        loader = _Loader(text)
        loader.get_event()
        if loader.check_event(yaml.StreamEndEvent):
            return None
        node = loader.compose_document()
        if not loader.check_event(yaml.StreamEndEvent):
            line = loader.peek_event().start_mark.line + 1
            raise fail("a second document starts here", "put each document in a file of its own", line)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise fail(f"character U+{ord(text[error.position]):04X} is not allowed in YAML", "remove it", line) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"not valid YAML: {error.problem}" + (f" {error.context}" if error.context else "")
        if error.context and error.context_mark and mark and error.context_mark.line != mark.line:
            message += f" that starts in line {error.context_mark.line + 1}"
        hints = {r"'\t'": "indent with spaces", "mapping values": "quote a string that holds ': '"}
        hint = next((hint for sign, hint in hints.items() if sign in message), None)
        raise fail(message, hint, mark.line + 1 if mark else None) from error
    except (ValueError, OverflowError) as error:
        raise fail(f"not valid YAML: {error}") from error
    except RecursionError as error:
        raise fail("the document is nested too deeply") from error
    return node


def _build(root: Any, file: str) -> Document:
    """The plain value of a node graph with the place of every key and item, or all that is wrong with it."""
    marks: dict[KeyPath, Place] = {}
    problems: list[Problem] = []

    def wrong(path: KeyPath, node: Any, message: str, hint: str | None = None) -> None:
        problems.append(Problem(path=path, message=message, hint=hint, file=file, line=node.start_mark.line + 1))

    def scalar(node: Any, path: KeyPath) -> Any:
        if node.tag == _TAG + "str":
            return node.value
        wanted = object if node.tag == _PLAIN else _CORE_TAGS.get(node.tag.removeprefix(_TAG))
        try:
            value = _resolve(node.value)
        except ValueError as error:
            return wrong(path, node, str(error))
        if wanted is None:
            return wrong(path, node, f"tag {_shown_tag(node.tag)} is not known here", "remove it; quotes make a string")
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted not in (bool, object)):
            return wrong(path, node, f"{node.value!r} is not what its tag {_shown_tag(node.tag)} says")
        return float(value) if wanted == (int, float) else value

    def key(node: Any, path: KeyPath, seen: dict[str, int]) -> str:
        target = node.target if isinstance(node, _Alias) else node
        if not isinstance(target, yaml.ScalarNode):
            wrong(path, node, "a key is a string, found a collection")
            return f"<key {len(seen)}>"
        if target.tag == _PLAIN and target.value == "<<":
            wrong(path, node, "merge key '<<' is not YAML 1.2", "write the keys out")
        elif target.tag != _TAG + "str" and not (target.tag == _PLAIN and _is_string(target.value)):
            wrong(path, node, f"a key is a string, found {target.value or 'null'}", f"quote it: '{target.value}'")
        elif target.value in seen:
            wrong(path, node, f"duplicate key {target.value!r}", f"it was given in line {seen[target.value]}")
        seen.setdefault(target.value, node.start_mark.line + 1)
        return target.value

    def build(node: Any, path: KeyPath, above: tuple[int, ...]) -> Any:
        target = node.target if isinstance(node, _Alias) else node
        if id(target) in above:
            return wrong(path, node, "an alias contains itself", "write the value out")
        if len(path) > _DEPTH_LIMIT:
            return wrong(path[:3], node, f"the document is nested deeper than {_DEPTH_LIMIT} levels")
        if len(marks) > _NODE_LIMIT:
            raise SpecError([Problem(message=f"more than {_NODE_LIMIT} values after expanding aliases", file=file)])
        if isinstance(target, yaml.ScalarNode):
            return scalar(target, path)
        mapping = isinstance(target, yaml.MappingNode)
        if target.tag != _TAG + ("map" if mapping else "seq"):
            wrong(path, node, f"tag {_shown_tag(target.tag)} is not known here", "remove it")
        above = (*above, id(target))
        if not mapping:
            for index, item in enumerate(target.value):
                marks[(*path, index)] = (file, item.start_mark.line + 1)
            return [build(item, (*path, index), above) for index, item in enumerate(target.value)]
        result, seen = {}, {}
        for key_node, value_node in target.value:
            name = key(key_node, path, seen)
            marks.setdefault((*path, name), (file, key_node.start_mark.line + 1))
            value = build(value_node, (*path, name), above)
            result.setdefault(name, value)
        return result

    marks[()] = (file, root.start_mark.line + 1)
    value = build(root, (), ())
    if problems:
        raise SpecError(problems)
    return Document(value=value, file=file, marks=marks)


def _resolve(text: str) -> Any:
    """The value of a plain scalar in the YAML 1.2 core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for pattern, base in _INTEGERS:
        if pattern.fullmatch(text):
            if len(text) > 4000:
                raise ValueError(f"a number of {len(text)} digits is too long")
            return int(text, base)
    if _FLOAT.fullmatch(text):
        if math.isinf(float(text)):
            raise ValueError(f"{text} is too large for a number; write .inf if infinity is meant")
        return float(text)
    return text


def _is_string(text: str) -> bool:
    """Whether a plain scalar is a string, which is what does not match anything else."""
    return text not in _CONSTANTS and not any(kind.fullmatch(text) for kind in (_FLOAT, *(kind for kind, _ in _INTEGERS)))


def _node(value: Any, flat: bool = False) -> yaml.Node:
    """The node that writes `value`; `flat` keeps a string on one line."""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"keys are strings, found {wrong[0]!r}")
        pairs = [(_node(key, flat=True), _node(item)) for key, item in value.items()]
        return yaml.MappingNode(_TAG + "map", pairs, flow_style=False)
    if isinstance(value, list | tuple):
        scalars = not any(isinstance(item, dict | list | tuple) for item in value)
        short = scalars and sum(len(str(item)) + 2 for item in value) <= _FLOW_WIDTH
        return yaml.SequenceNode(_TAG + "seq", [_node(item) for item in value], flow_style=short)
    if isinstance(value, str):
        style = None
        if "\n" in value and not flat and all(line.isprintable() and line == line.strip() for line in value.split("\n")):
            style = "|" if value[0] != "\n" else '"'
        elif not value.isprintable():
            style = '"'
        elif not _is_string(value):
            style = "'"
        return yaml.ScalarNode(_TAG + "str", value, style=style)
    if value is None or isinstance(value, bool | int | float):
        kind = "null" if value is None else "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
        return yaml.ScalarNode(
            _TAG + kind, str(value).lower() if kind == "bool" else "null" if value is None else _number(value)
        )
    raise TypeError(f"cannot write a {type(value).__name__} as YAML: {value!r}")


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    mantissa, exponent, power = repr(value).partition("e")
    return mantissa + (".0" if exponent and "." not in mantissa else "") + exponent + power


def _copy(value: Any) -> Any:
    """A copy that shares nothing, not even between its own parts."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _shown_tag(tag: str) -> str:
    return "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
