"""Finds the rollout in a phase's graph, and says in what two rollouts differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.core.inline import inlined
from sftk.core.replay import is_replayable
from sftk.core.transform import FunctionTransform, Node, Transform
from sftk.spec.schema import PhaseSection

Place = tuple[int, str]
"""A node among a rollout's, and one of its results."""

Difference = tuple[str, str, str]
"""What differs, and both of its values in words."""


@attrs.frozen(kw_only=True, eq=False)
class Rollout:
    """The part of a graph up to its last step that is declared `replay=True`.

    Args:
        graph: all of it. nodes: of the rollout, in order.
        names: place to the key that it is written under. needed: keys that the rest of the graph reads or returns, and places.
        roles: of the recipe, that the rollout calls. models: the phase's, port to role.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    names: dict[Place, str]
    needed: dict[str, Place]
    roles: frozenset[str]
    models: Mapping[str, str]

    def opened(self) -> Rollout | None:
        """The same with the graphs among its nodes put in their places, or None where there are none.

        So the rollout within a spec that another one uses can be told from what that spec does with it.
        """
        if not any(isinstance(node.op, Graph) for node in self.nodes):
            return None
        nodes = [part for node in self.graph.nodes for part in (inlined(node) if node in self.nodes else [node])]
        return find_rollout(self.graph.with_nodes(nodes), self.models)


def find_rollout(graph: Graph, models: Mapping[str, str]) -> Rollout | None:
    """The rollout of a graph, or None where there is none.

    Args:
        models: role of the graph to role of the recipe, where they differ.

    Example:
        >>> found = find_rollout(Graph.from_spec("specs/score_critic.yaml"), {})
        >>> [node.op.name for node in found.nodes], sorted(found.needed), sorted(found.roles)
        (['rollout'], ['exit_from', 'exit_to', 'x0'], ['generator'])
    """
    steps = [index for index, node in enumerate(graph.nodes) if _replays(node.op)]
    if not steps:
        return None
    kept: list[Node] = []
    wanted = set(graph.nodes[steps[-1]].writes)
    for index in range(steps[-1], -1, -1):
        node = graph.nodes[index]
        if wanted & set(node.writes) or index in steps:
            kept.insert(0, node)
            wanted |= {key for _, key in (*node.reads, *node.may_read)}
    rest = [node for node in graph.nodes if node not in kept]
    read = {*graph.outputs, *(key for node in rest for _, key in (*node.reads, *node.may_read))}
    names = {(place, result): key for place, node in enumerate(kept) for result, key in node.results}
    roles = frozenset(models.get(role, role) for node in kept for _, role in node.roles)
    needed = {key: place for place, key in names.items() if key in read}
    return Rollout(graph=graph, nodes=tuple(kept), names=names, needed=needed, roles=roles, models=models)


def matched(one: Rollout, other: Rollout) -> tuple[Rollout, Rollout]:
    """Both, opened until their nodes have the same names; as they are where that never comes."""
    opened = [[one], [other]]
    for rollouts in opened:
        while (inner := rollouts[-1].opened()) is not None:
            rollouts.append(inner)
    pairs = ((a, b) for a in opened[0] for b in opened[1])
    return next(((a, b) for a, b in pairs if _names(a.nodes) == _names(b.nodes)), (one, other))


def differences(one: Rollout, other: Rollout, phase: PhaseSection, other_phase: PhaseSection) -> list[Difference]:
    """In what two rollouts differ, each thing once; nothing where they make the same samples of the same inputs.

    Args:
        phase, other_phase: those of the rollouts, whose `in` says what their inputs are.
    """
    found = dict.fromkeys(_of_nodes(one.nodes, other.nodes))
    written = {key for node in one.nodes for key in node.writes}
    reads = dict.fromkeys(key for node in one.nodes for _, key in (*node.reads, *node.may_read) if key not in written)
    for key in reads:
        mine, its = _source(key, one, phase), _source(key, other, other_phase)
        if mine != its:
            found[f"in.{key}", mine, its] = None
    for role in dict.fromkeys(role for node in one.nodes for _, role in node.roles):
        mine, its = one.models.get(role, role), other.models.get(role, role)
        if mine != its:
            found[f"models.{role}", mine, its] = None
    return list(found)


def _source(key: str, rollout: Rollout, phase: PhaseSection) -> str:
    known = key in (*rollout.graph.inputs, *rollout.graph.optional)
    return phase.in_.get(key, key) if known else "nothing"


def _of_nodes(nodes: tuple[Node, ...], others: tuple[Node, ...]) -> Iterator[Difference]:
    names, other_names = _names(nodes), _names(others)
    if names != other_names:
        yield "nodes", ", ".join(names), ", ".join(other_names)
        return
    for node, other in zip(nodes, others, strict=True):
        for what in ("reads", "may_read", "roles"):
            if getattr(node, what) != getattr(other, what):
                yield f"{what} of {node.op.name}", str(getattr(node, what)), str(getattr(other, what))
        yield from _of_operations(node, other)


def _of_operations(node: Node, other: Node) -> Iterator[Difference]:
    one, two = node.op, other.op
    if isinstance(one, FunctionTransform) and one is two:
        mine, its = one.complete(node.options), one.complete(other.options)
        compared = [name for name in mine if name not in one.gradient]
        yield from ((name, repr(mine[name]), repr(its[name])) for name in compared if mine[name] != its[name])
    elif isinstance(one, Graph) and isinstance(two, Graph):
        yield from _of_nodes(one.nodes, two.nodes)
    elif isinstance(one, Fold) and isinstance(two, Fold):
        turns = ((fold.over, fold.item, fold.carry, fold.collect) for fold in (one, two))
        mine, its = map(repr, turns)
        if mine != its:
            yield f"fold over {one.over}", mine, its
        yield from _of_nodes(one.nodes, two.nodes)
    elif one is not two:
        yield "node", repr(one), repr(two)


def _names(nodes: tuple[Node, ...]) -> list[str]:
    return [node.op.name for node in nodes]


def _replays(op: Transform) -> bool:
    return is_replayable(op) if isinstance(op, Graph | Fold) else isinstance(op, FunctionTransform) and op.replay
