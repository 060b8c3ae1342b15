"""Graphs from spec files: parameters bound, nested specs resolved, every problem with the place that caused it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from sftk.core import registry
from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.core.transform import Node, Transform
from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.convert import structure
from sftk.spec.document import Document, KeyPath
from sftk.spec.files import find_file, show_path
from sftk.spec.source import read_yaml

_FROM_PYTHON = "parameters"


@attrs.frozen(kw_only=True)
class NodeSpec:
    """A node as a spec writes it: `use` or `fold`, and how its keys, models and options are bound."""

    use: str | None = None
    fold: FoldSpec | None = None
    in_: dict[str, str] = attrs.field(factory=dict)
    out: dict[str, str | None] = attrs.field(factory=dict)
    models: dict[str, str] = attrs.field(factory=dict)
    with_: dict[str, Any] = attrs.field(factory=dict)
    grad: bool = True
    doc: str = ""

    def __attrs_post_init__(self) -> None:
        if (self.use is None) == (self.fold is None):
            raise ValueError("a node has either `use` or `fold`")


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


@attrs.frozen(kw_only=True)
class Origin:
    """A parameter's value and the place that a mistake in it is blamed on."""

    value: Any
    document: Document
    path: KeyPath
    prefix: KeyPath = ()

    def blame(self, message: str, hint: str | None = None) -> Problem:
        """A problem at the place where the value was written."""
        return self.document.problem(self.path, message, hint).under(*self.prefix)


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


def spec_params(path: Path) -> dict[str, Any]:
    """The parameters that a spec declares, with their defaults.

    Example:
        >>> spec_params(find_file("specs/sample_ode.yaml"))["steps"]
        50
    """
    params = read_yaml(path, show_path(path)).get(("params",), {})
    return dict(params) if isinstance(params, dict) else {}


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
        self.problems: list[Problem] = []
        self.env: dict[str, Origin] = {}
        self.used: set[str] = set()
        self.open = False

    def build(self, bound: Mapping[str, Origin], defaults: Mapping[str, Any]) -> tuple[Graph | None, list[Problem]]:
        self._bind(bound, defaults)
        nodes = self._nodes(self.spec.nodes, ("nodes",))
        for name in sorted(self.env.keys() - self.used):
            hint = f"use ${name} in a node's `with`, or remove it"
            self.problems.append(self.document.problem(("params", name), f"the parameter {name!r} is never used", hint))
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

    def _bind(self, bound: Mapping[str, Origin], defaults: Mapping[str, Any]) -> None:
        declared = self.spec.params
        for name, origin in bound.items():
            if name not in declared:
                hint = did_you_mean(name, declared) or ("it has none" if not declared else None)
                self.problems.append(origin.blame(f"{show_path(self.path)} has no parameter {name!r}", hint))
        self.used |= {default[1:] for default in declared.values() if isinstance(default, str) and default.startswith("$")}
        for name, default in declared.items():
            here = Origin(value=default, document=self.document, path=("params", name))
            if name in bound:
                self.env[name] = bound[name]
            elif name in defaults:
                self.env[name] = attrs.evolve(here, value=defaults[name])
            else:
                self.env[name] = self._value(default, here)

    def _value(self, raw: Any, here: Origin) -> Origin:
        """A written value, or what the parameter stands for when it is `$name`."""
        if not (isinstance(raw, str) and raw.startswith("$")):
            return here
        name = raw[1:]
        if name not in self.env:
            later = name in self.spec.params
            message = f"{raw} stands for a parameter that " + (
                "is declared further down" if later else "this spec does not declare"
            )
            self.problems.append(here.blame(message, did_you_mean(name, self.spec.params)))
            return attrs.evolve(here, value=None)
        self.used.add(name)
        return self.env[name]

    def _nodes(self, specs: tuple[NodeSpec, ...], path: KeyPath) -> list[Node]:
        return [self._node(spec, (*path, index)) for index, spec in enumerate(specs)]

    def _node(self, spec: NodeSpec, path: KeyPath) -> Node:
        values = {
            name: self._value(raw, Origin(value=raw, document=self.document, path=(*path, "with", name)))
            for name, raw in spec.with_.items()
        }
        options: dict[str, Any] = {name: _freeze(origin.value) for name, origin in values.items()}
        op: Transform
        if spec.fold is not None:
            op = self._fold(spec.fold, (*path, "fold"))
        elif spec.use is not None and spec.use.endswith((".yaml", ".yml")):
            op, options = self._nested(spec.use, values, path), {}
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

    def _nested(self, name: str, values: Mapping[str, Origin], path: KeyPath) -> Transform:
        try:
            found = find_file(name, self.path)
        except SpecError as error:
            self.problems += [self.document.problem((*path, "use"), p.message, p.hint) for p in error.problems]
            return self._unknown(name)
        if found.resolve() in self.stack:
            names = " -> ".join(show_path(p) for p in (*self.stack, found.resolve()))
            self.problems.append(self.document.problem((*path, "use"), f"specs use each other in a circle: {names}"))
            return self._unknown(name)
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
            if isinstance(raw, str) and raw.startswith("$") and raw[1:] in self.env:
                return self.env[raw[1:]].blame(problem.message, problem.hint)
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
