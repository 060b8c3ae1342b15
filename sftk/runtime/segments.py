"""Compiles what lies between a graph's model calls: runs of tensor-only nodes become one compiled function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.core.transform import FunctionTransform, Node, Transform


class Segment(Transform):
    """Consecutive nodes that call no model and draw nothing, behind one `torch.compile`.

    Args:
        nodes: in order.
        backend: of `torch.compile`.
    """

    kind = "reduced"

    def __init__(self, nodes: Sequence[Node], backend: str = "inductor"):
        written = list(dict.fromkeys(key for node in nodes for key in node.writes))
        own: set[str] = set()
        required: dict[str, None] = {}
        optional: dict[str, None] = {}
        for node in nodes:
            required |= {key: None for _, key in node.reads if key not in own}
            optional |= {key: None for _, key in node.may_read if key not in own}
            own |= set(node.writes)
        self.nodes = tuple(nodes)
        self.name = " + ".join(node.op.name for node in nodes)
        self.doc = "compiled together"
        self.inputs = tuple(required)
        self.optional = tuple(key for key in optional if key not in required)
        self.outputs, self.ports = tuple(written), ()
        inner = Graph(nodes, inputs=self.inputs, optional=self.optional, outputs=self.outputs, name=self.name)

        def run(values: dict[str, Any]) -> dict[str, Any]:
            return inner.run(values, {})

        # Dynamo keeps graphs by code object: with one of its own, segments do not share a recompile limit.
        run.__code__ = run.__code__.replace(co_name=f"segment_{nodes[0].op.name}")
        self._compiled = torch.compile(run, backend=backend)

    def run(self, values: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
        return self._compiled(dict(values))


def compile_segments(graph: Graph, backend: str = "inductor") -> Graph:
    """The same graph with its tensor-only stretches compiled. Model calls, draws and host plans stay eager.

    Args:
        graph: is not changed.
        backend: of `torch.compile`.

    Example:
        >>> from sftk.functional import add_noise, flow_target
        >>> graph = Graph([add_noise, flow_target], inputs=("x0", "noise", "timestep"))
        >>> [node.op.name for node in compile_segments(graph, "eager").nodes]
        ['add_noise + flow_target']
    """
    return graph.with_nodes(_compile(graph.nodes, backend))


def _compile(nodes: Sequence[Node], backend: str) -> list[Node]:
    made: list[Node] = []
    run: list[Node] = []

    def flush() -> None:
        if run:
            made.append(Segment(tuple(run), backend).node())
            run.clear()

    for node in nodes:
        if _compilable(node):
            run.append(node)
            continue
        flush()
        if isinstance(node.op, Graph | Fold):
            inner = node.op.with_nodes(_compile(node.op.nodes, backend))
            node = Node(op=inner, in_=node.in_, out=node.out, models=node.models, grad=node.grad, options=node.options)
        made.append(node)
    flush()
    return made


def _compilable(node: Node) -> bool:
    op = node.op
    return isinstance(op, FunctionTransform) and not op.ports and op.kind in ("per_sample", "reduced") and op.tensors_only
