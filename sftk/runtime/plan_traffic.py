"""What ranks send each other in one update: collectives by role and kind, their bytes, and over which links these go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import attrs

from sftk.runtime.gradients import BUCKET
from sftk.runtime.plan_models import RoleSize
from sftk.runtime.plan_pass import PhasePass, StagePass
from sftk.runtime.plan_rates import NETWORK, Gpu
from sftk.runtime.plan_trace import Exchanged
from sftk.runtime.plan_visits import Counts, count_visits
from sftk.spec.arrangement import Arrangement, policies
from sftk.spec.parallel import ModelParallel
from sftk.spec.schema import Recipe

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


@attrs.frozen(kw_only=True)
class Traffic:
    """Collectives of one kind for one role, in one update of a phase; a mean over exit steps.

    Args:
        role, kind: which. ranks: that join each.
        calls: how many there are.
        payload: bytes of what they gather, scatter, sum or exchange, as each rank holds it whole.
        within, across: bytes that a rank sends to its own node and to others, the mean over ranks.
    """

    role: str
    kind: Kind
    ranks: int
    calls: float
    payload: float
    within: float
    across: float

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return self.within + self.across

    def seconds(self, device: Gpu) -> float:
        """Time, with both links at work together and nothing else."""
        return max(self.within / device.link, self.across / NETWORK) / 1e9


def phase_traffic(phase: PhasePass, measured: StagePass, recipe: Recipe, found: Arrangement, node: int) -> tuple[Traffic, ...]:
    """Everything that a phase sends in one update, but for sums of a few numbers such as losses and norms.

    Args:
        phase: of `measured`. recipe: one stage. found: its ranks. node: ranks of a node.

    Source: rings send (n - 1) / n of a tensor to gather or scatter it, twice that to sum it; see docs/plan.md.
    """
    rows: list[Traffic] = []
    known = policies(recipe)
    for role in sorted(measured.roles.keys() | phase.calls.keys()):
        source = _source(recipe, role)
        if source in known and found.ranks > 1:
            rows += _weights(role, phase, measured.roles[source], recipe, known[source], found, node)
        if role in phase.work.exchanged:
            rows.append(_exchanged(role, phase.work.exchanged[role], found, node))
    return tuple(row for row in rows if row.payload)


def _exchanged(role: str, one: Exchanged, found: Arrangement, node: int) -> Traffic:
    across = share_across(groups(found.ranks, found.sequence), node, ring=False)
    return Traffic(
        role=role,
        kind="all_to_all",
        ranks=found.sequence,
        calls=one.calls * found.accumulation,
        payload=one.payload * found.accumulation,
        within=one.sent * found.accumulation * (1 - across),
        across=one.sent * found.accumulation * across,
    )


def _source(recipe: Recipe, role: str) -> str:
    """The role whose weights a role has: an average's are where its source's are."""
    return recipe.models[role].ema_of or role


def _weights(
    role: str, phase: PhasePass, size: RoleSize, recipe: Recipe, policy: ModelParallel, found: Arrangement, node: int
) -> Iterator[Traffic]:
    shards, trained = found.shards[_source(recipe, role)], role in phase.roles
    copies = found.ranks // shards
    wide = max(4, size.bytes_each)
    between = share_across([range(first, found.ranks, shards) for first in range(shards)], node, ring=True)

    def ring(kind: Kind, ranks: int, calls: float, payload: float, across: float) -> Traffic:
        sent = payload * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)
        return Traffic(
            role=role,
            kind=kind,
            ranks=ranks,
            calls=calls,
            payload=payload if ranks > 1 else 0.0,
            within=sent * (1 - across),
            across=sent * across,
        )

    if shards == 1 and not policy.offload:
        payload = float(wide * size.parameters) if trained else 0.0
        yield ring("all_reduce", copies, math.ceil(payload / BUCKET), payload, between)
        return
    root, block = unit_counts(role, phase, recipe, policy, found.accumulation)
    inside = share_across(groups(found.ranks, shards), node, ring=True)
    held, units = gather_bytes(recipe, role, size), [(root, size.units[0]), *((block, unit) for unit in size.units[1:])]
    whole = [(counts, unit.padded(shards)) for counts, unit in units]
    yield ring("all_gather", shards, sum(c.gathers for c, _ in whole), held * sum(c.gathers * n for c, n in whole), inside)
    yield ring("reduce_scatter", shards, sum(c.reduces for c, _ in whole), wide * sum(c.reduces * n for c, n in whole), inside)
    yield ring("all_reduce", copies, sum(c.sums for c, _ in whole), wide * sum(c.sums * n for c, n in whole) / shards, between)


def unit_counts(role: str, phase: PhasePass, recipe: Recipe, policy: ModelParallel, micro: int) -> tuple[Counts, Counts]:
    """Of what no block of a role holds, and of each of its blocks; the mean over exit steps."""
    made = Counts(), Counts()
    for visits in phase.visits:
        for root, total in zip((True, False), made, strict=True):
            one = count_visits(
                visits.get(role, ()),
                root=root,
                micro=micro,
                reshard=policy.reshard is not False or recipe.models[role].ema_of is not None,
                rests=role in recipe.optimizers,
                trained=role in phase.roles,
                whole=recipe.parallel.accumulate == "whole",
            )
            total.add(one, 1 / len(phase.visits))
    return made


def gather_bytes(recipe: Recipe, role: str, size: RoleSize) -> int:
    """Bytes of a weight as FSDP2 gathers it: in half precision under `precision: bf16`."""
    half = recipe.precision == "bf16" and recipe.models[_source(recipe, role)].dtype == "fp32"
    return 2 if half else size.bytes_each


def groups(ranks: int, size: int) -> list[range]:
    """Consecutive ranks, so many in each group.

    Example:
        >>> groups(4, 2)
        [range(0, 2), range(2, 4)]
    """
    return [range(first, first + size) for first in range(0, ranks, size)]


def share_across(found: list[range], node: int, *, ring: bool) -> float:
    """What share of the bytes that ranks of a group send each other leaves their node, the mean over groups.

    Args:
        found: ranks of each group. node: ranks of a node.
        ring: each sends to the next one alone, else to all others alike.

    Example:
        >>> share_across(groups(16, 16), 8, ring=True), share_across(groups(16, 2), 8, ring=False)
        (0.125, 0.0)
        >>> share_across([range(0, 16, 8)], 8, ring=True)
        1.0
    """
    total = 0.0
    for group in found:
        nodes = [rank // node for rank in group]
        size = len(nodes)
        if size == 1:
            continue
        if ring:
            total += sum(here != there for here, there in zip(nodes, [*nodes[1:], nodes[0]], strict=True)) / size
        else:
            total += 1 - (sum(nodes.count(one) for one in nodes) - size) / (size * (size - 1))
    return total / len(found)
