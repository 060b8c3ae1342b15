"""A graph that stands as a node in another, as its own nodes."""

from __future__ import annotations

from sftk.core.graph import Graph
from sftk.core.transform import Node


def inlined(node: Node) -> list[Node]:
    """The nodes of a graph that stands as a node in another, to stand there themselves; a node of another kind as it is.

    Keys of the inner graph that nobody outside saw are written as `<graph>.<key>`.

    Example:
        >>> from sftk.functional import add_noise, flow_target
        >>> inner = Graph([add_noise, flow_target], inputs=("x0", "noise", "timestep"), outputs=("target",), name="inner")
        >>> [part.writes for part in inlined(inner.node(out={"target": "flow"}))]
        [('inner.noisy',), ('flow',)]
    """
    graph = node.op
    if not isinstance(graph, Graph):
        return [node]
    outside = {key: node.in_.get(key, key) for key in (*graph.inputs, *graph.optional)}
    outside |= {key: node.out.get(key, key) or f"{graph.name}.{key}" for key in graph.outputs if key not in outside}

    def named(key: str) -> str:
        return outside.get(key, f"{graph.name}.{key}")

    return [
        part.op.node(
            in_={argument: named(key) for argument, key in (*part.reads, *part.may_read)},
            out=dict.fromkeys(part.op.outputs) | {result: named(key) for result, key in part.results},
            models={port: node.models.get(role, role) for port, role in part.roles},
            grad=part.grad and node.grad,
            **part.options,
        )
        for part in graph.nodes
    ]
