"""YAML text into nodes: syntax, without the types of its scalars."""

from __future__ import annotations

from typing import Any, cast

import attrs
import yaml

from sftk.errors import Problem, SpecError
from sftk.spec.scalars import TAG

PLAIN = "plain scalar"
"""Tag of a scalar without quotes and tag of its own, whose type is still open."""


@attrs.frozen
class Alias:
    """Stands for a node that an anchor names, at the place of the alias."""

    target: yaml.Node
    start_mark: yaml.Mark
    tag: str = "alias"
    value: str = "*"


class _Loader(yaml.SafeLoader):
    """Composes nodes without the types of YAML 1.1, and keeps where an alias stands."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return PLAIN if implicit[0] else TAG + "str"
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.ScalarEvent) and event.tag == "!":
            cast(Any, node).tag = TAG + "str"
        return Alias(cast(yaml.Node, node), event.start_mark) if isinstance(event, yaml.AliasEvent) else node


def compose(text: str, file: str) -> Any:
    """The node graph of the only document in `text`; None when it has none.

    Args:
        text: YAML.
        file: its name in errors.

    Raises:
        SpecError: the first syntax error, or a second document.

    Example:
        >>> [(key.value, value.tag) for key, value in compose("on: 1", "x.yaml").value]
        [('on', 'plain scalar')]
    """

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
