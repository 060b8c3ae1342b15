"""Documents: plain values, and the file and line where each of their parts was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import attrs

from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.wording import counted, describe

KeyPath = tuple[str | int, ...]
Place = tuple[str, int | None]

_MISSING = object()


@attrs.frozen(kw_only=True)
class Document:
    """A plain value (dicts, lists, scalars) and where its parts were written. Never changed: `replace` gives a new one.

    Args:
        value: what was read.
        file: the file as errors show it.
        marks: the place (file, line from 1 or None) of the key or the list item at a path.

    Example:
        >>> from sftk.spec.source import parse_yaml
        >>> document = parse_yaml("phases:\\n  - name: critic\\n    every: 1", "dmd.yaml")
        >>> document.where(("phases", 0, "every", "more"))
        ('dmd.yaml', 3)
        >>> print(document.at(("phases", 0)).problem(("every",), "too often"))
        too often @ $.every (dmd.yaml:3)
    """

    value: Any
    file: str
    marks: Mapping[KeyPath, Place] = attrs.field(factory=dict, repr=False)

    def copy(self) -> Document:
        """The same document with a value of its own."""
        return attrs.evolve(self, value=_copy(self.value))

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
            >>> from sftk.spec.source import parse_yaml
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
            >>> from sftk.spec.source import parse_yaml
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
                message = f"index {step} is out of range: the list has {counted(len(node), 'item')}"
            elif isinstance(step, int) and node is None:
                hint = "items are not added one by one: give the whole list"
            raise SpecError([Problem(path=done, message=message, hint=hint, file=file, line=line)])

        return Document(value=_copy(put(self.value, path, ())), file=self.file, marks=marks)


def _copy(value: Any) -> Any:
    """A copy that shares nothing, not even between its own parts."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
