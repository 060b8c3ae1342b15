"""The turns of a training step: phases as they run, and as they run with the rollout of an earlier one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import attrs

from sftk.core.graph import Graph
from sftk.spec.rollouts import Rollout, differences, find_rollout, matched
from sftk.spec.schema import PhaseSection, Recipe

Finding = tuple[tuple[str | int, ...], str, str | None]
"""Where in the recipe, what is wrong, what would help."""


@attrs.frozen(kw_only=True, eq=False)
class Turn:
    """How a phase runs on some steps.

    Args:
        phase: the section; of a turn with another phase's rollout, `in` says where it comes from.
        graph: without the rollout that is given, and with what later turns take of it.
        every: it runs on each step that this divides. but: not on those that this divides; None runs on all of them.
        shared: it takes another phase's rollout.
    """

    phase: PhaseSection
    graph: Graph
    every: int
    but: int | None = None
    shared: bool = False

    @property
    def name(self) -> str:
        """The phase's, or `<phase>.shared`."""
        return f"{self.phase.name}.shared" if self.shared else self.phase.name

    def due(self, step: int) -> bool:
        """Whether it runs on a step, counted from 0."""
        return step % self.every == 0 and (self.but is None or step % self.but != 0)


def turns(recipe: Recipe, graphs: Mapping[str, Graph]) -> tuple[Turn, ...]:
    """The turns of a recipe, in the order in which they run within a step.

    Args:
        graphs: phase name to graph.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("benchmarks/dmd_1.3b.yaml", ["share_rollout=true"])
        >>> found = turns(stage.recipe, stage.graphs)
        >>> [[turn.name for turn in found if turn.due(step)] for step in range(2)]
        [['generator', 'critic.shared'], ['critic']]
        >>> found[2].graph.ports, found[2].phase.in_["x0"]
        (('fake_score',), 'generator.x0')
    """
    pairs = {pair.taker.name: pair for pair in _pairs(recipe, graphs)} if recipe.share_rollout else {}
    made: list[Turn] = []
    for phase in recipe.phases:
        graph, pair = graphs[phase.name], pairs.get(phase.name)
        for other in pairs.values():
            if other.giver is phase:
                graph = other.giving(graph)
        both = None if pair is None else math.lcm(phase.every, pair.giver.every)
        if both != phase.every:
            made.append(Turn(phase=phase, graph=graph, every=phase.every, but=both))
        if pair is not None and both is not None:
            made.append(Turn(phase=pair.section, graph=pair.cut, every=both, shared=True))
    return tuple(made)


def cycle(found: tuple[Turn, ...]) -> dict[str, int]:
    """How often each turn runs until all phases have taken theirs.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("benchmarks/dmd_1.3b.yaml", ["share_rollout=true"])
        >>> cycle(turns(stage.recipe, stage.graphs))
        {'generator': 1, 'critic': 4, 'critic.shared': 1}
    """
    steps = math.lcm(*(turn.every for turn in found))
    return {turn.name: sum(turn.due(step) for step in range(steps)) for turn in found}


def sharing_findings(recipe: Recipe, graphs: Mapping[str, Graph]) -> Iterator[Finding]:
    """What keeps phases from sharing a rollout, where a recipe asks for it."""
    if not recipe.share_rollout:
        return
    pairs = _pairs(recipe, graphs)
    if not pairs and len(graphs) == len(recipe.phases):
        yield (
            ("share_rollout",),
            "no phase rolls a model out again that a phase above it has rolled out and updates",
            "leave it out, or put the student's phase first",
        )
    for pair in pairs:
        yield from pair.findings()


@attrs.frozen(kw_only=True, eq=False)
class _Pair:
    """A phase that takes a rollout, and the one that gives it.

    Args:
        place: of the taker among the phases, and `giver_place` of the giver.
    """

    taker: PhaseSection
    place: int
    taken: Rollout
    giver: PhaseSection
    giver_place: int
    given: Rollout

    @property
    def keys(self) -> dict[str, str]:
        """What the taker's graph needs of the rollout: its key to the giver's."""
        return {key: self.given.names[place] for key, place in self.taken.needed.items() if place in self.given.names}

    def giving(self, graph: Graph) -> Graph:
        """The giver's graph (as it is, or as it gives to another phase, too), which returns what is taken."""
        known = {*graph.inputs, *(key for node in graph.nodes for key in node.writes)}
        whole = graph if known >= set(self.keys.values()) else self.given.graph
        return whole.subgraph(tuple(dict.fromkeys((*graph.outputs, *self.keys.values()))))

    @property
    def section(self) -> PhaseSection:
        """The taker, which reads the rollout."""
        kept = {key: source for key, source in self.taker.in_.items() if key in (*self.cut.inputs, *self.cut.optional)}
        taken = {key: f"{self.giver.name}.{name}" for key, name in self.keys.items()}
        return attrs.evolve(self.taker, in_=kept | taken)

    @property
    def cut(self) -> Graph:
        """The taker's graph without its rollout."""
        return self.taken.graph.subgraph(self.taken.graph.outputs, given=tuple(self.keys))

    def findings(self) -> Iterator[Finding]:
        here, there = ("phases", self.place), f"$.phases[{self.giver_place}]"
        names = self.taker.name, self.giver.name
        for what, mine, other in differences(self.taken, self.given, self.taker, self.giver):
            where = (*here, "with", what) if what in self.taker.with_ else (*here, "graph")
            other_place = f"{there}.with.{what}" if what in self.giver.with_ else there
            message = f"share_rollout: {names[0]!r} rolls out with {what}: {mine}, {names[1]!r} with {other} (at {other_place})"
            yield where, message, "make them equal, or leave out share_rollout"
        if len(self.taken.nodes) != len(self.given.nodes):
            return
        for key, place in self.taken.needed.items():
            if place not in self.given.names:
                message = (
                    f"share_rollout: {names[0]!r} reads the rollout's {key!r}, which {self.giver.graph} drops (at {there})"
                )
                yield (*here, "graph"), message, "keep it in that spec's `out`"
        others = {source.partition(".")[0] for source in self.taker.in_.values() if "." in source} - {self.giver.name}
        if others:
            message = f"share_rollout: {names[0]!r} reads {sorted(others)} and cannot have the samples of {names[1]!r}, too"
            yield (*here, "in"), message, "leave out share_rollout"


def _pairs(recipe: Recipe, graphs: Mapping[str, Graph]) -> list[_Pair]:
    """Every phase that rolls a model out which it does not update, with the nearest one above that rolls it out and does."""
    pairs: list[_Pair] = []
    givers: list[tuple[int, PhaseSection, Rollout]] = []
    for place, phase in enumerate(recipe.phases):
        rollout = find_rollout(graphs[phase.name], phase.models) if phase.name in graphs else None
        if rollout is None:
            continue
        if rollout.roles & set(phase.roles):
            givers.append((place, phase, rollout))
            continue
        for giver_place, giver, given in reversed(givers):
            if given.roles & rollout.roles:
                taken, given = matched(rollout, given)
                pairs.append(_Pair(taker=phase, place=place, taken=taken, giver=giver, giver_place=giver_place, given=given))
                break
    return pairs
