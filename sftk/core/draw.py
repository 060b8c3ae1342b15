"""Drawings of graphs: Mermaid flowcharts and terminal trees."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sftk.core.transform import FunctionTransform, Node, Transform

_WORD = re.compile(r"[A-Za-z_$][\w./$-]*")
"""Strings that need no quotes."""


def mermaid(graph: Any) -> str:
    """A Mermaid flowchart: nodes, the keys that flow between them, models as rounded boxes, folds as subgraphs."""
    lines, writers = ["flowchart TD"], {}
    for key in (*graph.inputs, *graph.optional):
        lines.append(f"  in_{key}([{key}])")
        writers[key] = f"in_{key}"
    _mermaid_nodes(graph.nodes, "n", writers, lines, "  ")
    lines += [f"  {writers[key]} --> out_{key}([{key}])" for key in graph.outputs]
    return "\n".join(lines)


def _mermaid_nodes(nodes: tuple[Node, ...], prefix: str, writers: dict[str, str], lines: list[str], pad: str) -> None:
    for index, node in enumerate(nodes):
        name = f"{prefix}{index}"
        sources: dict[str, list[str]] = {}
        for _, key in (*node.reads, *node.may_read):
            if key in writers:
                sources.setdefault(writers[key], []).append(key)
        inner = getattr(node.op, "nodes", None)
        if inner is None:
            roles = "".join(f"<br/><i>{role}</i>" for _, role in node.roles)
            lines.append(f'{pad}{name}["{node.op.name}{roles}"]')
        else:
            lines.append(f'{pad}subgraph {name}["{_title(node.op)}"]')
            _mermaid_nodes(inner, f"{name}_", {}, lines, pad + "  ")
            lines.append(f"{pad}end")
        for source, keys in sources.items():
            lines.append(f"{pad}{source} -- {', '.join(keys)} --> {name}")
        for key in node.writes:
            writers[key] = name


def tree(graph: Any) -> str:
    """A tree for the terminal: one line per node with what it reads, calls and writes."""
    lines = [f"{graph.name}({', '.join((*graph.inputs, *(f'{k}?' for k in graph.optional)))})"]
    _tree_nodes(graph.nodes, lines, "")
    lines.append(f"-> {', '.join(graph.outputs)}")
    return "\n".join(lines)


def _tree_nodes(nodes: tuple[Node, ...], lines: list[str], pad: str) -> None:
    for index, node in enumerate(nodes):
        last = index == len(nodes) - 1
        lines.append(f"{pad}{'└─' if last else '├─'} {_line(node)}")
        inner = getattr(node.op, "nodes", None)
        if inner:
            _tree_nodes(inner, lines, pad + ("   " if last else "│  "))


def _line(node: Node) -> str:
    keys = [key for _, key in node.reads]
    call = f"{_title(node.op)}({', '.join(keys)})" if isinstance(node.op, FunctionTransform) else _title(node.op)
    roles = f" [{', '.join(role for _, role in node.roles)}]" if node.roles else ""
    options = f" {{{', '.join(f'{k}: {_short(v)}' for k, v in node.options.items())}}}" if node.options else ""
    return f"{call}{roles}{options} -> {', '.join(node.writes)}{'' if node.grad else '  (no grad)'}"


def _short(value: Any) -> str:
    text = _yaml(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _yaml(value: Any) -> str:
    """A value in YAML's flow style, as a spec writes it.

    Example:
        >>> _yaml({"steps": (1000, 1e-4), "shift": None, "warp": True, "name": "true", "kind": "flow"})
        '{steps: [1000, 0.0001], shift: null, warp: true, name: "true", kind: flow}'
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        case str():
            plain = _WORD.fullmatch(value) and value.lower() not in ("null", "true", "false")
            return value if plain else json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(map(_yaml, value))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_yaml(item)}' for key, item in value.items())}}}"
    return str(value)


def _title(op: Transform) -> str:
    over = getattr(op, "over", None)
    return f"for each {getattr(op, 'item', 'item')} of {over}" if over else op.name
