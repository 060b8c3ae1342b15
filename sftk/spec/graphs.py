"""Graphs from spec files: parameters bound, nested specs resolved, every problem with the place that caused it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from sftk.core import registry
from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.core.transform import Node, Transform
from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.convert import structure
from sftk.spec.document import Document, KeyPath
from sftk.spec.files import find_file, show_path
from sftk.spec.params import ALL, Origin, Parameters
from sftk.spec.source import read_yaml

_FROM_PYTHON = "parameters"


def is_spec(name: str | None) -> bool:
    """Whether a `use` names a spec file.

    Example:
        >>> is_spec("specs/rollout.yaml"), is_spec("add_noise")
        (True, False)
    """
    return name is not None and name.endswith((".yaml", ".yml"))


@attrs.frozen(kw_only=True)
class NodeSpec:
    """A node as a spec writes it: `use` or `fold`, and how its keys, models and options are bound."""

    use: str | None = None
    fold: FoldSpec | None = None
    in_: dict[str, str] = attrs.field(factory=dict)
    out: dict[str, str | None] = attrs.field(factory=dict)
    models: dict[str, str] = attrs.field(factory=dict)
    with_: dict[str, Any] | Literal["$params"] = attrs.field(factory=dict)
    grad: bool = True
    doc: str = ""

    def __attrs_post_init__(self) -> None:
        if (self.use is None) == (self.fold is None):
            raise ValueError("a node has either `use` or `fold`")
        if self.with_ == ALL and not is_spec(self.use):
            raise ValueError(f"`with: {ALL}` is for a node that uses a spec; write the options out")


@attrs.frozen(kw_only=True)
class FoldSpec:
    """A fold as a spec writes it, see `sftk.core.Fold`."""

    over: str
    item: str
    carry: tuple[str, ...] | dict[str, str]
    nodes: tuple[NodeSpec, ...]
    collect: dict[str, str] = attrs.field(factory=dict)
    doc: str = ""


@attrs.frozen(kw_only=True)
class GraphSpec:
    """A spec file."""

    doc: str
    inputs: tuple[str, ...]
    nodes: tuple[NodeSpec, ...]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    params: dict[str, Any] = attrs.field(factory=dict)
    params_of: tuple[str, ...] = ()


def load_graph(path: Any, params: Mapping[str, Any] | None = None, *, frames: int | None = None) -> Graph:
    """Reads a spec and binds its parameters. `Graph.from_spec` is this function.

    Args:
        path: the spec, looked up in the working directory and then in the package.
        params: values of its parameters.
        frames: latent frames of its inputs, when known: lets it check that they divide into blocks.

    Raises:
        SpecError: with every problem of the spec, of the specs that it uses and of the parameters.

    Example:
        >>> load_graph("specs/sample_ode.yaml", {"steps": 4}).inputs
        ('noise', 'prompt_embeds', 'negative_embeds')
    """
    given = Document(value=dict(params or {}), file=_FROM_PYTHON)
    bound = {name: Origin(value=value, document=given, path=(name,)) for name, value in given.value.items()}
    graph, problems = build_graph(find_file(str(path)), bound, frames=frames)
    if graph is None or problems:
        raise SpecError(once(problems))
    return graph


def once(problems: Iterable[Problem]) -> list[Problem]:
    """The problems without repetitions: a file that two phases use, a value that several nodes read."""
    found: dict[Any, Problem] = {}
    for problem in problems:
        value = problem.path[-2:-1] in (("with",), ("params",)) or problem.file == _FROM_PYTHON
        found.setdefault((problem.file, problem.line, problem.path, None if value else problem.message), problem)
    return list(found.values())


def build_graph(
    path: Path,
    bound: Mapping[str, Origin],
    *,
    frames: int | None = None,
    defaults: Mapping[str, Any] | None = None,
    stack: tuple[Path, ...] = (),
) -> tuple[Graph | None, list[Problem]]:
    """The graph of a spec file, and every problem on the way.

    Args:
        path: the file.
        bound: parameters that the caller binds.
        frames: see `load_graph`.
        defaults: values that replace the spec's own defaults where it has a parameter of that name (`compat`).
        stack: files that are being built around this one.
    """
    path = path.resolve()
    if path in stack:
        names = " -> ".join(show_path(p) for p in (*stack[stack.index(path) :], path))
        return None, [Problem(message=f"specs use each other in a circle: {names}", file=show_path(path))]
    try:
        document = read_yaml(path, show_path(path))
        spec = structure(document, GraphSpec)
    except SpecError as error:
        return None, list(error.problems)
    return _Builder(document, spec, path, frames, stack).build(bound, defaults or {})


class _Builder:
    def __init__(self, document: Document, spec: GraphSpec, path: Path, frames: int | None, stack: tuple[Path, ...]):
        self.document, self.spec, self.path, self.frames = document, spec, path, frames
        self.stack = (*stack, path)
        self.params = Parameters(path, document)
        self.problems = self.params.problems
        self.open = False

    def build(self, bound: Mapping[str, Origin], defaults: Mapping[str, Any]) -> tuple[Graph | None, list[Problem]]:
        self.params.bind(bound, defaults)
        nodes = self._nodes(self.spec.nodes, ("nodes",))
        self.problems += self.params.unused()
        try:
            graph = Graph(
                nodes,
                inputs=self.spec.inputs,
                optional=self.spec.optional,
                outputs=self.spec.outputs,
                ports=self.spec.models,
                name=self.path.stem,
                doc=self.spec.doc,
                frames=self.frames,
                open_ended=self.open,
            )
        except SpecError as error:
            self.problems += [self._blame(problem) for problem in error.problems]
            return None, self.problems
        return (None if self.problems else graph), self.problems

    def _nodes(self, specs: tuple[NodeSpec, ...], path: KeyPath) -> list[Node]:
        return [self._node(spec, (*path, index)) for index, spec in enumerate(specs)]

    def _node(self, spec: NodeSpec, path: KeyPath) -> Node:
        written = {} if isinstance(spec.with_, str) else spec.with_
        values = {
            name: self.params.resolve(Origin(value=raw, document=self.document, path=(*path, "with", name)))
            for name, raw in written.items()
        }
        options: dict[str, Any] = {name: _freeze(origin.value) for name, origin in values.items()}
        op: Transform
        if spec.fold is not None:
            op = self._fold(spec.fold, (*path, "fold"))
        elif is_spec(spec.use) and spec.use is not None:
            op, options = self._nested(spec.use, values, path, everything=spec.with_ == ALL), {}
        else:
            op = self._registered(spec.use or "", path)
        return Node(op=op, in_=spec.in_, out=spec.out, models=spec.models, grad=spec.grad, options=options)

    def _registered(self, name: str, path: KeyPath) -> Transform:
        try:
            return registry.lookup(name)
        except SpecError:
            hint = did_you_mean(name, registry.transforms()) or "a module that registers it belongs in the recipe's `plugins`"
            self.problems.append(self.document.problem((*path, "use"), f"unknown transform {name!r}", hint))
            return self._unknown(name)

    def _fold(self, spec: FoldSpec, path: KeyPath) -> Fold:
        return Fold(
            self._nodes(spec.nodes, (*path, "nodes")),
            over=spec.over,
            item=spec.item,
            carry=spec.carry,
            collect=spec.collect,
            doc=spec.doc,
        )

    def _nested(self, name: str, values: Mapping[str, Origin], path: KeyPath, everything: bool) -> Transform:
        try:
            found = find_file(name, self.path)
        except SpecError as error:
            self.problems += [self.document.problem((*path, "use"), p.message, p.hint) for p in error.problems]
            return self._unknown(name)
        if found.resolve() in self.stack:
            names = " -> ".join(show_path(p) for p in (*self.stack, found.resolve()))
            self.problems.append(self.document.problem((*path, "use"), f"specs use each other in a circle: {names}"))
            return self._unknown(name)
        if everything:
            values = self.params.shared_with(found)
        graph, problems = build_graph(found, values, frames=self.frames, stack=self.stack)
        self.problems += problems
        return graph if graph is not None else self._unknown(name)

    def _unknown(self, name: str) -> Transform:
        self.open = True
        return _Unknown(name)

    def _blame(self, problem: Problem) -> Problem:
        """The problem at the line that caused it: a parameter's value is blamed on whoever wrote it."""
        if len(problem.path) >= 2 and problem.path[-2] == "with":
            raw = self.document.get(problem.path, None)
            if isinstance(raw, str) and raw.startswith("$") and raw[1:] in self.params.env:
                return self.params.env[raw[1:]].blame(problem.message, problem.hint)
        return self.document.locate(problem)


class _Unknown(Transform):
    """Stands in for a transform that was not found, so that the rest of a spec can still be checked."""

    kind = "reduced"
    doc = ""
    inputs = optional = outputs = ports = ()
    unknown = True

    def __init__(self, name: str):
        self.name = name


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


registry.set_graph_reader(load_graph)
