"""Checks a list of nodes and reports every problem, each with its path."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from sftk.core.options import option_problem
from sftk.core.transform import FunctionTransform, Node
from sftk.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from sftk.core.fold import Fold


def check_graph(
    nodes: Sequence[Node],
    *,
    inputs: Sequence[str],
    optional: Sequence[str],
    outputs: Sequence[str] | None,
    ports: Sequence[str] | None,
    rebind: Sequence[str],
    frames: int | None = None,
) -> tuple[list[Problem], list[str]]:
    """Every problem of a graph, and the keys that its nodes write."""
    available, maybe = set(inputs), set(optional)
    problems = [
        Problem(path=("inputs",), message=f"the input {key!r} is declared twice") for key in _repeated((*inputs, *optional))
    ]
    written: list[str] = []
    problems += check_nodes(nodes, available, maybe, set(rebind), ports, written, frames)
    for index, key in enumerate(outputs or ()):
        if key not in available:
            problems.append(
                Problem(
                    path=("outputs", index),
                    message=f"the output {key!r} is written by no node",
                    hint=did_you_mean(key, available),
                    missing=True,
                )
            )
    return problems, list(dict.fromkeys(written))


def check_nodes(
    nodes: Sequence[Node],
    available: set[str],
    maybe: set[str],
    rebind: set[str],
    ports: Sequence[str] | None,
    written: list[str],
    frames: int | None,
) -> list[Problem]:
    """Walks the nodes in order; adds what they write to `available` and `written`. `maybe` holds optional inputs."""
    problems: list[Problem] = []
    for index, node in enumerate(nodes):
        place = ("nodes", index)
        problems += [p.under(*place) for p in _check_names(node, frames)]
        if not _is_fold(node):
            problems += [p.under(*place) for p in _check_reads(node, available, maybe)]
        if ports is not None:
            problems += [p.under(*place) for p in _check_ports(node, ports)]
        if _is_fold(node):
            problems += [p.under(*place, "fold") for p in _check_fold(node, available, maybe, ports, frames)]
        carried = _carried(node)
        for result, key in node.results:
            if (key in available or key in maybe) and key not in rebind and key not in carried:
                problems.append(
                    Problem(
                        path=(*place, "out", result) if result in node.out else (*place, "out"),
                        message=f"{node.op.name} writes {key!r}, which is already written",
                        hint=f"rename it with out: {{{result}: ...}}",
                    )
                )
            available.add(key)
            written.append(key)
    return problems


def free_keys(nodes: Sequence[Node], bound: Sequence[str]) -> tuple[list[str], list[str]]:
    """Keys that the nodes read from outside: (required, optional)."""
    known = set(bound)
    required: dict[str, None] = {}
    optional: dict[str, None] = {}
    for node in nodes:
        required |= {key: None for _, key in node.reads if key not in known}
        optional |= {key: None for _, key in node.may_read if key not in known}
        known |= set(node.writes)
    return list(required), [key for key in optional if key not in required]


def _check_names(node: Node, frames: int | None) -> list[Problem]:
    """Unknown arguments, results, ports and options of one node."""
    op = node.op
    if getattr(op, "unknown", False):
        return []
    groups: list[tuple[str, Iterable[str], Sequence[str], str]] = [
        ("in", node.in_, (*op.inputs, *op.optional), "argument"),
        ("out", node.out, op.outputs, "result"),
        ("models", node.models, op.ports, "model port"),
    ]
    problems = [
        Problem(path=(field, name), message=f"{op.name} has no {what} {name!r}", hint=did_you_mean(name, known) or _none(known))
        for field, names, known, what in groups
        for name in names
        if name not in known
    ]
    options: dict[str, Any] = op.options if isinstance(op, FunctionTransform) else {}
    for name, value in node.options.items():
        if name not in options:
            hint = did_you_mean(name, options) or _none(options)
            problems.append(Problem(path=("with", name), message=f"{op.name} has no option {name!r}", hint=hint))
        elif isinstance(op, FunctionTransform) and (found := option_problem(op, name, value)):
            problems.append(Problem(path=("with", name), message=found))
    for name, parameter in options.items():
        if parameter.default is inspect.Parameter.empty and name not in node.options:
            problems.append(
                Problem(path=("with",), message=f"{op.name} needs the option {name!r}", hint=f"add with: {{{name}: ...}}")
            )
    if isinstance(op, FunctionTransform) and op.check is not None and not problems:
        found = op.check(op.complete(node.options), frames)
        problems += [Problem(path=("with", name), message=message) for name, message in found]
    return problems


def _check_reads(node: Node, available: set[str], maybe: set[str]) -> list[Problem]:
    problems = []
    for argument, key in node.reads:
        if key not in available:
            path = ("in", argument) if argument in node.in_ else ("in",) if node.in_ else ()
            why = "which is an optional input of this graph" if key in maybe else "which nothing before it writes"
            message = f"{node.op.name} reads {key!r}, {why}"
            hint = _near(key, available) or f"rename it with in: {{{argument}: ...}}"
            problems.append(Problem(path=path, message=message, hint=hint, missing=key not in maybe))
    for argument, key in node.may_read:
        if argument in node.in_ and key not in available | maybe:
            message = f"{node.op.name} binds its optional input {argument!r} to {key!r}, which nothing before it writes"
            problems.append(Problem(path=("in", argument), message=message, hint=_near(key, available), missing=True))
    return problems


def _check_ports(node: Node, ports: Sequence[str]) -> list[Problem]:
    problems = []
    for port, role in node.roles:
        if role not in ports:
            bound = port in node.models
            message = (
                f"the model port {port!r} of {node.op.name} is bound to {role!r}, which is no role of this graph"
                if bound
                else f"the model port {port!r} of {node.op.name} is not bound"
            )
            hint = did_you_mean(role, ports) or f"bind it with models: {{{port}: ...}}"
            problems.append(Problem(path=("models", port) if bound else (), message=message, hint=hint))
    return problems


def _carried(node: Node) -> set[str]:
    """Keys that a fold both starts from and hands back, so that it may bind them again."""
    starts = {key: node.in_.get(key, key) for key, start in getattr(node.op, "carry", {}).items() if key == start}
    return {outer for key, outer in starts.items() if node.out.get(key, key) == outer}


def _check_fold(
    node: Node, available: set[str], maybe: set[str], ports: Sequence[str] | None, frames: int | None
) -> list[Problem]:
    fold, problems = cast("Fold", node.op), []
    over = node.in_.get(fold.over, fold.over)
    if over not in available:
        message = f"folds over {over!r}, which nothing before it writes"
        problems.append(Problem(path=("over",), message=message, hint=_near(over, available), missing=True))
    starts = {key: node.in_.get(start, start) for key, start in fold.carry.items()}
    problems += [
        Problem(
            path=("carry", key),
            message=f"carries {start!r}, which nothing before the fold writes",
            hint=_near(start, available),
            missing=True,
        )
        for key, start in starts.items()
        if start not in available
    ]
    inside = _renamed(available, node.in_) | {fold.item} | set(fold.carry)
    written: list[str] = []
    problems += check_nodes(fold.nodes, inside, _renamed(maybe, node.in_), set(fold.carry), ports, written, frames)
    problems += [
        Problem(
            path=(section, key),
            message=f"{does} {key!r}, which its body never writes",
            hint=_near(key, written),
            missing=True,
        )
        for section, does, keys in (("carry", "carries", fold.carry), ("collect", "collects", fold.collect))
        for key in keys
        if key not in written
    ]
    return problems


def _renamed(keys: set[str], names: Mapping[str, str]) -> set[str]:
    """Keys of a graph as the body of a fold sees them."""
    return (keys - set(names)) | {name for name, key in names.items() if key in keys}


def _is_fold(node: Node) -> bool:
    return hasattr(node.op, "carry") and hasattr(node.op, "over")


def _near(word: str, known: Iterable[str]) -> str | None:
    hint = did_you_mean(word, known)
    return hint if hint and hint.startswith("did you mean") else None


def _none(known: Iterable[str]) -> str:
    return "it has none" if not list(known) else "expected one of " + ", ".join(map(repr, sorted(known)))


def _repeated(keys: Sequence[str]) -> list[str]:
    return sorted({key for key in keys if keys.count(key) > 1})
