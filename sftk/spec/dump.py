"""Plain values into readable YAML."""

from __future__ import annotations

import sys
from typing import Any, cast

import yaml

from sftk.spec.scalars import TAG, is_string, number_text

_FLOW_WIDTH = 80


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


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _node(value: Any, flat: bool = False) -> yaml.Node:
    """The node that writes `value`; `flat` keeps a string on one line."""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"keys are strings, found {wrong[0]!r}")
        pairs = [(_node(key, flat=True), _node(item)) for key, item in value.items()]
        return yaml.MappingNode(TAG + "map", pairs, flow_style=False)
    if isinstance(value, list | tuple):
        scalars = not any(isinstance(item, dict | list | tuple) for item in value)
        short = scalars and sum(len(str(item)) + 2 for item in value) <= _FLOW_WIDTH
        return yaml.SequenceNode(TAG + "seq", [_node(item) for item in value], flow_style=short)
    if isinstance(value, str):
        style = None
        if "\n" in value and not flat and all(line.isprintable() and line == line.strip() for line in value.split("\n")):
            style = "|" if value[0] != "\n" else '"'
        elif not value.isprintable():
            style = '"'
        elif not is_string(value):
            style = "'"
        return yaml.ScalarNode(TAG + "str", value, style=style)
    if value is None or isinstance(value, bool | int | float):
        kind = "null" if value is None else "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
        return yaml.ScalarNode(
            TAG + kind, str(value).lower() if kind == "bool" else "null" if value is None else number_text(value)
        )
    raise TypeError(f"cannot write a {type(value).__name__} as YAML: {value!r}")
