"""Backward by replay: steps that need no graph of one another run without one, and again with one, after the loss is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.core.numerics import as_with_gradient
from sftk.core.transform import FunctionTransform, Kind, Node, Transform


def replayed(graph: Graph) -> tuple[Graph, Tape]:
    """The same graph with every replayable step run without a graph for backward, and the tape that runs them again.

    The outputs of such a step become leaves, at which `loss.backward()` stops; `Tape.pull_back` then takes the gradient on into
    the models, one step at a time, the last first. So activations of one step are alive at a time, and none while the loss is
    computed. The gradient is that of the graph itself; second derivatives through a replayed step do not exist.

    Args:
        graph: is not changed.

    Returns:
        The graph, and a tape that is empty until the graph runs.

    Source: stochastic gradient truncation, Self-Forcing, arXiv 2506.08009, section 3.2: blocks share values and no gradient,
        so that each block's step can be differentiated on its own.

    Example:
        >>> from sftk.core import registry, transform
        >>> @transform(out="y", kind="per_sample", models=("model",), replay=True)
        ... def slow_step(model, x):
        ...     '''A step that is expensive to remember.'''
        ...     return model(x)
        >>> graph, tape = replayed(Graph([slow_step], inputs=("x",)))
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> graph.run({"x": torch.tensor([3.0, 4.0])}, {"model": model})["y"].sum().backward()
        >>> model.weight.grad is None, len(tape)
        (True, 1)
        >>> tape.pull_back()
        >>> print(model.weight.grad)
        tensor([[3., 4.]])
        >>> registry.unregister("slow_step")
    """
    tape = Tape()
    return graph.with_nodes(_recorded(graph.nodes, tape)), tape


def is_replayable(graph: Graph | Fold) -> bool:
    """Whether a graph has a step that `replayed` would run again.

    Example:
        >>> is_replayable(Graph.from_spec("specs/rollout.yaml")), is_replayable(Graph.from_spec("specs/dmd.yaml"))
        (True, False)
    """
    return any(is_replayable(node.op) if isinstance(node.op, Graph | Fold) else _replays(node) for node in graph.nodes)


class Tape:
    """What the replayable steps of a graph were given, in the order in which they ran, and where their gradients arrive."""

    def __init__(self) -> None:
        self._records: list[_Record] = []

    def __len__(self) -> int:
        return len(self._records)

    def record(self, run: Callable[[], dict[str, Any]], given: Any) -> dict[str, Any]:
        """Runs a step without a graph and returns its outputs as leaves.

        Args:
            run: the step.
            given: everything that the step reads.
        """
        gradients: dict[int, Tensor] = {}
        with torch.no_grad(), as_with_gradient():  # the gradient is to be that of these values
            values, structure = pytree.tree_flatten(run())
        leaves = [_leaf(value, index, gradients) for index, value in enumerate(values)]
        linked = any(isinstance(value, Tensor) and value.requires_grad for value in pytree.tree_leaves(given))
        self._records.append(_Record(run=run, gradients=gradients, linked=linked))
        return pytree.tree_unflatten(leaves, structure)

    def pull_back(self, before_last: Callable[[], None] | None = None) -> None:
        """Takes the gradients that arrived at the leaves on into the models, and empties the tape.

        Args:
            before_last: is called before the last backward pass, where ranks begin to share gradients; where steps hand
                gradients on to earlier ones, before the first one that may be the last.

        Raises:
            RuntimeError: of a step's backward pass; the tape is empty then, too.
        """
        records, self._records = self._records, []
        while records:
            record = records.pop()
            if before_last is not None and not any(earlier.gradients for earlier in records):
                before_last()
                before_last = None
            record.pull_back()


@attrs.frozen(kw_only=True, eq=False)
class _Record:
    """One step: how to run it, the gradients of its outputs so far, whether its inputs hang on earlier leaves."""

    run: Callable[[], dict[str, Any]]
    gradients: dict[int, Tensor]
    linked: bool

    def pull_back(self) -> None:
        if not self.gradients:
            return
        with torch.enable_grad():
            values = pytree.tree_leaves(self.run())
        found = [(values[index], gradient) for index, gradient in self.gradients.items() if values[index].requires_grad]
        if found:
            outputs, cotangents = zip(*found, strict=True)
            # What lies between two steps (keys that were passed on straight through) is differentiated once for each later one.
            torch.autograd.backward(outputs, cotangents, retain_graph=self.linked)


def _leaf(value: Any, index: int, gradients: dict[int, Tensor]) -> Any:
    """The value as a leaf whose gradient goes to `gradients`. Only the graph keeps it alive: most outputs are not used."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value

    def keep(leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradients[index] = gradients[index] + leaf.grad if index in gradients else leaf.grad
        leaf.grad = None

    leaf = value.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(keep)
    return leaf


class _Recorded(Transform):
    """A replayable node on a tape. Inside `torch.no_grad` it is the node itself."""

    def __init__(self, node: Node, tape: Tape):
        op = node.op
        assert isinstance(op, FunctionTransform)
        self.name, self.doc, self.inputs, self.optional = op.name, op.doc, op.inputs, op.optional
        self.kind: Kind = op.kind
        self.outputs, self.ports = op.outputs, op.ports
        self._op, self._options, self._tape = op, dict(node.options), tape

    def run(self, values: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {**models, **values, **self._options}

        def run() -> dict[str, Any]:
            return self._op.pack(self._op.fn(**arguments))

        return self._tape.record(run, values) if torch.is_grad_enabled() else run()


def _recorded(nodes: Sequence[Node], tape: Tape) -> list[Node]:
    made = []
    for node in nodes:
        if isinstance(node.op, Graph | Fold):
            node = attrs.evolve(node, op=node.op.with_nodes(_recorded(node.op.nodes, tape)))
        elif _replays(node):
            node = attrs.evolve(node, op=_Recorded(node, tape), options={})
        made.append(node)
    return made


def _replays(node: Node) -> bool:
    return node.grad and isinstance(node.op, FunctionTransform) and node.op.replay
