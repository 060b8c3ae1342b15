"""Reads strict YAML 1.2 (core schema) with places: `1e-4` is a number, `on` is a string, a repeated key is an error."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.compose import PLAIN, Alias, compose
from sftk.spec.document import Document, KeyPath, Place
from sftk.spec.scalars import CORE_TAGS, TAG, is_string, resolve_scalar

_NODE_LIMIT = 300_000  # nested aliases can expand a short file without bound
_DEPTH_LIMIT = 100


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
    return _parsed(text, file).copy()


@lru_cache(maxsize=256)
def _parsed(text: str, file: str) -> Document:
    """A recipe's graphs, and a study's recipes even more so, use the same few specs again and again."""
    node = compose(text, file)
    if node is None or (node.tag == PLAIN and not node.value):
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
    node = compose(text, file)
    body = text.strip()
    if node is None and not body:
        return None
    whole = node is not None and text[node.start_mark.index : node.end_mark.index].strip() == body
    block = (isinstance(node, yaml.CollectionNode) and not node.flow_style) or getattr(node, "style", None) in ("|", ">")
    if node is None or not whole or block:
        hint = "quote a string that holds ': ' or ' #', and write a collection as [a, b] or {a: b}"
        raise SpecError([Problem(message=f"expected one YAML value, found {body!r}", hint=hint, file=file)])
    return _build(node, file).value


def _build(root: Any, file: str) -> Document:
    """The plain value of a node graph with the place of every key and item, or all that is wrong with it."""
    marks: dict[KeyPath, Place] = {}
    problems: list[Problem] = []

    def wrong(path: KeyPath, node: Any, message: str, hint: str | None = None) -> None:
        problems.append(Problem(path=path, message=message, hint=hint, file=file, line=node.start_mark.line + 1))

    def scalar(node: Any, path: KeyPath) -> Any:
        if node.tag == TAG + "str":
            text = _without_surrogates(node.value)
            if text is None:
                wrong(path, node, "half of a surrogate pair is no character", "write the character itself, or both halves")
            return text
        wanted = object if node.tag == PLAIN else CORE_TAGS.get(node.tag.removeprefix(TAG))
        try:
            value = resolve_scalar(node.value)
        except ValueError as error:
            return wrong(path, node, str(error))
        if wanted is None:
            return wrong(path, node, f"tag {_shown_tag(node.tag)} is not known here", "remove it; quotes make a string")
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted not in (bool, object)):
            return wrong(path, node, f"{node.value!r} is not what its tag {_shown_tag(node.tag)} says")
        return float(value) if wanted == (int, float) else value

    def key(node: Any, path: KeyPath, seen: dict[str, int]) -> str:
        target = node.target if isinstance(node, Alias) else node
        if not isinstance(target, yaml.ScalarNode):
            wrong(path, node, "a key is a string, found a collection")
            return f"<key {len(seen)}>"
        if target.tag == PLAIN and target.value == "<<":
            wrong(path, node, "merge key '<<' is not YAML 1.2", "write the keys out")
        elif target.tag != TAG + "str" and not (target.tag == PLAIN and is_string(target.value)):
            wrong(path, node, f"a key is a string, found {target.value or 'null'}", f"quote it: '{target.value}'")
        elif target.value in seen:
            wrong(path, node, f"duplicate key {target.value!r}", f"it was given in line {seen[target.value]}")
        seen.setdefault(target.value, node.start_mark.line + 1)
        return target.value

    def build(node: Any, path: KeyPath, above: tuple[int, ...]) -> Any:
        target = node.target if isinstance(node, Alias) else node
        if id(target) in above:
            return wrong(path, node, "an alias contains itself", "write the value out")
        if len(path) > _DEPTH_LIMIT:
            return wrong(path[:3], node, f"the document is nested deeper than {_DEPTH_LIMIT} levels")
        if len(marks) > _NODE_LIMIT:
            raise SpecError([Problem(message=f"more than {_NODE_LIMIT} values after expanding aliases", file=file)])
        if isinstance(target, yaml.ScalarNode):
            return scalar(target, path)
        mapping = isinstance(target, yaml.MappingNode)
        if target.tag != TAG + ("map" if mapping else "seq"):
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


def _without_surrogates(text: str) -> str | None:
    """The text with each surrogate pair, as JSON escapes characters beyond U+FFFF, as one character; None with half of one."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


def _shown_tag(tag: str) -> str:
    return "!!" + tag.removeprefix(TAG) if tag.startswith(TAG) else tag
