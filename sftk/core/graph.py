"""Graphs: checked, ordered lists of transforms that are transforms themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sftk.core import draw, registry
from sftk.core.check import check_graph
from sftk.core.closure import bind, compile_step
from sftk.core.fold import Fold
from sftk.core.state import from_state, to_state
from sftk.core.transform import Kind, Node, Transform
from sftk.errors import ShapeError, SpecError, did_you_mean

if TYPE_CHECKING:
    from tensordict import TensorDict


class Graph(Transform):
    """An ordered list of transforms, checked when it is built.

    Args:
        nodes: transforms or nodes (`transform.node(...)`), in the order in which they run.
        inputs: keys that the caller gives.
        optional: keys that the caller may give.
        outputs: keys to return; by default everything that the nodes write.
        ports: roles that the caller binds; when given, a node that needs another role is an error.
        rebind: keys that may be written again (a fold's carry).
        name, doc: for drawings and errors.
        frames: latent frames of the inputs, when known; lets nodes check that they divide into blocks.
        open_ended: some node is a stand-in for an unknown one, so that nothing is said about keys that nobody writes.

    Raises:
        SpecError: every problem at once: a key read before it is written or written twice, an unknown option,
            argument, result or port, a missing output.

    Example:
        >>> import torch
        >>> from sftk.functional import add_noise, interpolate
        >>> graph = Graph([add_noise], inputs=("x0", "noise", "timestep"))
        >>> zero = torch.zeros(1, 3, 4, 2, 2)
        >>> state = {"x0": zero, "noise": zero + 1, "timestep": torch.full((1, 3), 250.0)}
        >>> graph(state)["noisy"].unique()
        tensor([0.2500])
    """

    kind: Kind = "reduced"

    def __init__(
        self,
        nodes: Iterable[Transform | Node],
        *,
        inputs: Sequence[str],
        optional: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        ports: Sequence[str] | None = None,
        rebind: Sequence[str] = (),
        name: str = "graph",
        doc: str = "",
        frames: int | None = None,
        open_ended: bool = False,
    ):
        self.nodes = tuple(n if isinstance(n, Node) else n.node() for n in nodes)
        self.name, self.doc = name, doc
        self.inputs, self.optional, self.rebind = tuple(inputs), tuple(optional), tuple(rebind)
        problems, written = check_graph(
            self.nodes,
            inputs=self.inputs,
            optional=self.optional,
            outputs=outputs,
            ports=ports,
            rebind=self.rebind,
            frames=frames,
        )
        if open_ended:
            problems = [problem for problem in problems if not problem.missing]
        if problems:
            raise SpecError(problems)
        self.outputs = tuple(written) if outputs is None else tuple(outputs)
        self.ports = tuple(dict.fromkeys(role for node in self.nodes for _, role in node.roles))
        self._steps = tuple(compile_step(node) for node in self.nodes)

    @classmethod
    def from_spec(cls, path: Any, **params: Any) -> Graph:
        """The graph of a spec file with its parameters bound.

        Args:
            path: a file, looked up beside the caller's working directory and then in the package.
            **params: values of the spec's `params`.

        Raises:
            SpecError: the file or a parameter is wrong.

        Example:
            >>> import sftk
            >>> Graph.from_spec("specs/rollout.yaml", frames_per_block=1).ports
            ('denoiser',)
        """
        return registry.read_graph(path, params)

    def run(self, values: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
        state = dict(values)
        for step in self._steps:
            step(state, models)
        return {key: state[key] for key in self.outputs}

    def __call__(self, state: Mapping[str, Any] | TensorDict, models: Mapping[str, Any] | None = None) -> Any:
        """Runs the graph on a State and returns a new one with the outputs added.

        Args:
            state: a TensorDict with `batch_size=[]`, or any mapping; it is not written to.
            models: role to model.

        Returns:
            The same kind of container as `state`, holding its entries and the graph's outputs.

        Raises:
            ShapeError: an input is missing.
            SpecError: a role is not bound.
        """
        models = models or {}
        values = from_state(state)
        self.check_inputs(values)
        self.check_models(models)
        return to_state(values | self.run(values, models), like=state)

    def check_inputs(self, values: Mapping[str, Any]) -> None:
        """Says which inputs are missing.

        Raises:
            ShapeError: one is.
        """
        missing = [key for key in self.inputs if key not in values]
        if missing:
            near = (did_you_mean(key, values) for key in missing)
            hints = dict.fromkeys(hint for hint in near if hint and hint.startswith("did you mean"))
            found = f"the graph {self.name!r} needs {missing} in its state, found {sorted(values)}"
            raise ShapeError("; ".join((found, *hints)))

    def check_models(self, models: Mapping[str, Any]) -> None:
        """Says which roles are without a model.

        Raises:
            SpecError: one is.
        """
        unbound = [role for role in self.ports if role not in models]
        if unbound:
            raise SpecError(f"the graph {self.name!r} needs models for {unbound}, found {sorted(models)}")

    def stream(self, values: Mapping[str, Any], models: Mapping[str, Any], key: str) -> Iterator[Any]:
        """Runs the graph up to the fold that collects `key`, and yields what each of its turns adds, when it is asked for.

        Nothing is kept of what was yielded, so that a fold may be longer than memory holds.

        Raises:
            SpecError: no fold among the graph's nodes collects `key`.

        Example:
            >>> from sftk.core import Fold, transform
            >>> @transform(out="square", kind="host")
            ... def square_item(number):
            ...     '''A square.'''
            ...     return number * number
            >>> fold = Fold([square_item], over="numbers", item="number", carry=(), collect={"square": "squares"})
            >>> squares = Graph([fold], inputs=("numbers",)).stream({"numbers": range(10**9)}, {}, "squares")
            >>> next(squares), next(squares)
            (0, 1)
            >>> registry.unregister("square_item")
        """
        state = dict(values)
        for node, step in zip(self.nodes, self._steps, strict=True):
            result = next((result for result, written in node.results if written == key), None)
            if result is not None and isinstance(node.op, Fold) and result in node.op.collect.values():
                (inner,) = (inner for inner, outer in node.op.collect.items() if outer == result)
                turns = node.op.turns(*bind(node, state, models), (inner,))
                for found in turns if node.grad else _without_grad(turns):
                    yield found.pop(inner)
                return
            step(state, models)
        raise SpecError(f"no fold of the graph {self.name!r} collects {key!r}")

    def trace(self, values: Mapping[str, Any], models: Mapping[str, Any]) -> Iterator[tuple[Node, str, Any]]:
        """Runs the graph node by node and yields (node, key, value) for everything that is written."""
        state = dict(values)
        for node, step in zip(self.nodes, self._steps, strict=True):
            step(state, models)
            for key in node.writes:
                yield node, key, state[key]

    def subgraph(self, outputs: Sequence[str], given: Sequence[str] = ()) -> Graph:
        """Only the nodes that `outputs` need.

        Args:
            outputs: keys to return.
            given: keys that the caller hands in, so that the nodes that would write them are not needed.

        Raises:
            SpecError: an output that no node writes, or a node that is needed and writes something given.

        Example:
            >>> from sftk.functional import add_noise, flow_target
            >>> graph = Graph([add_noise, flow_target], inputs=("x0", "noise", "timestep"))
            >>> [node.op.name for node in graph.subgraph(["target"]).nodes]
            ['flow_target']
            >>> graph.subgraph(["target", "noisy"], given=["noisy"])
            <graph graph: 1 nodes, x0, noise, noisy -> target, noisy>
        """
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.difference(given) & set(node.writes):
                kept.append(node)
                needed -= set(node.writes).difference(given)
                needed |= {key for _, key in (*node.reads, *node.may_read)}
        return Graph(
            reversed(kept),
            inputs=[key for key in dict.fromkeys((*self.inputs, *given)) if key in needed],
            optional=[key for key in self.optional if key in needed and key not in given],
            outputs=outputs,
            rebind=self.rebind,
            name=self.name,
            doc=self.doc,
        )

    def with_nodes(self, nodes: Iterable[Transform | Node]) -> Graph:
        """The same graph over other nodes (used to compile segments)."""
        return Graph(
            nodes,
            inputs=self.inputs,
            optional=self.optional,
            outputs=self.outputs,
            rebind=self.rebind,
            name=self.name,
            doc=self.doc,
        )

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart."""
        return draw.mermaid(self)

    def to_tree(self) -> str:
        """The graph as a tree for the terminal."""
        return draw.tree(self)

    def to_tdmodule(self, models: Mapping[str, Any] | None = None) -> Any:
        """The graph as a `tensordict.nn.TensorDictModule` that writes its outputs into the TensorDict it is given.

        Its `in_keys` are the graph's inputs and then its optional ones, which a TensorDict or a call with keywords may lack.
        Host values are non-tensor entries. Models that are modules are submodules, so that `parameters()` has theirs.

        Args:
            models: role to model.

        Raises:
            SpecError: a role is not bound.
            ShapeError: when it is called: an input is missing.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from sftk.functional import flow_target
            >>> module = Graph([flow_target], inputs=("x0", "noise")).to_tdmodule()
            >>> module(TensorDict({"x0": torch.zeros(1), "noise": torch.ones(1)}))["target"]
            tensor([1.])
        """
        from sftk.core.interop import as_tdmodule

        return as_tdmodule(self, models or {})

    def __repr__(self) -> str:
        return f"<graph {self.name}: {len(self.nodes)} nodes, {', '.join(self.inputs)} -> {', '.join(self.outputs)}>"


@torch.no_grad()
def _without_grad(items: Iterator[Any]) -> Iterator[Any]:
    yield from items
