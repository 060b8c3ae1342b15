"""Plans as text: one in full, several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sftk.errors import SpecError
from sftk.runtime.plan_layout import PhasePlan, Plan
from sftk.runtime.plan_rates import GIB
from sftk.runtime.plan_traffic import KINDS
from sftk.spec.wording import passes

Row = tuple[str, ...]
PARTS = {"weights": "weights", "optimizer": "optimiser", "average": "averages"}
PHASES = ("phase", "activations", "of it caches", "gradients", "gathered", "peak", "TFLOP", "attention", "seconds")
ROLES = ("role", "parameters", "ranks a copy", "weights", "gradients", "optimiser", "average", "gathered")
SENT = ("sent in an update", "", "ranks", "calls", "tensors", "within node", "across nodes")


def describe_plan(plan: Plan) -> Iterator[str]:
    """Lines that say all about one plan."""
    batch = passes(plan.per_rank, plan.accumulation, plan.sequence)
    yield f"{plan.stage}: {plan.gpus} x {plan.gpu}, {plan.node} a node; {batch}"
    yield from _table(ROLES, [*(_role(name, plan) for name in plan.roles), *_loaded(plan)])
    yield from _table(PHASES, [_phase(phase) for phase in plan.phases])
    sent = [
        (f"{phase.name}: {row.role}", row.kind.replace("_", "-"), str(row.ranks), f"{row.calls:.1f}", *map(gib, sizes))
        for phase in plan.phases
        for row in sorted(phase.traffic, key=lambda row: -row.sent)
        for sizes in [(row.payload, row.within, row.across)]
    ]
    yield from _table(SENT, sent) if sent else ()
    host = f", {gib(plan.host)} in the host's memory" if plan.host else ""
    yield f"  peak {gib(plan.peak)} of {gib(plan.budget)}{host}: {_verdict(plan)}; {plan.step_seconds:.2f} s a step"
    yield from (f"  {line}" for line in plan.advice)


def compare_counts(plans: Mapping[int, Plan | SpecError]) -> Iterator[str]:
    """Lines that set plans of one stage on several numbers of GPUs side by side, each in a column.

    Args:
        plans: number of GPUs to its plan, or why there is none; one of them is a plan.
    """
    found = [plan for plan in plans.values() if isinstance(plan, Plan)]
    first = found[0]
    yield f"{first.stage}: {first.gpu}, {first.node} a node; bytes of one rank"
    table: list[Row] = [
        ("samples in a pass", *(str(plan.per_rank) for plan in found)),
        ("passes of an update", *(str(plan.accumulation) for plan in found)),
        ("ranks that share a sample", *(str(plan.sequence) for plan in found)),
        *((f"{role}: ranks a copy", *(str(plan.roles[role].shards) for plan in found)) for role in first.roles),
        *((name, *(gib(plan.on_device(part)) for plan in found)) for part, name in PARTS.items()),
    ]
    if first.loaded:
        table.append(("codecs, text encoders", *(gib(_loaded_bytes(plan)) for plan in found)))
    for phases in zip(*(plan.phases for plan in found), strict=True):
        table += _compare_phases(phases)
    if any(plan.host for plan in found):
        table.append(("in the host's memory", *(gib(plan.host) for plan in found)))
    table.append((f"of {gib(first.budget)}", *map(_verdict, found)))
    table.append(("seconds a step", *(f"{plan.step_seconds:.1f}" for plan in found)))
    yield from _table(("GPUs", *(str(plan.gpus) for plan in found)), table, first=40)
    for gpus, plan in plans.items():
        if isinstance(plan, SpecError):
            yield f"  {gpus} GPUs: {plan}"


def _loaded_bytes(plan: Plan) -> float:
    return sum(held.bytes for held in plan.loaded.values() if held.on_device)


def _compare_phases(phases: Sequence[PhasePlan]) -> Iterator[Row]:
    name = phases[0].name
    for part in ("gradients", "gathered", "activations", "caches", "peak"):
        yield f"{name}: {part}", *(gib(getattr(phase, part)) for phase in phases)
    for kind in KINDS:
        for link, place in (("within", "within node"), ("across", "across nodes")):
            sent = [sum(getattr(row, link) for row in phase.traffic if row.kind == kind) for phase in phases]
            if any(sent):
                yield f"{name}: {kind.replace('_', '-')} {place}", *map(gib, sent)
    yield f"{name}: seconds", *(f"{phase.seconds:.1f}" for phase in phases)


def gib(size: float) -> str:
    """Bytes in GiB.

    Example:
        >>> gib(3 * 2**29)
        '1.5 GiB'
    """
    return f"{size / GIB:.1f} GiB"


def _role(name: str, plan: Plan) -> Row:
    role = plan.roles[name]
    where = " (host)" if role.offload else ""
    sizes = gib(role.weights) + where, gib(role.gradients), gib(role.optimizer), gib(role.average), gib(role.gathered)
    return name, f"{role.parameters / 1e6:.1f} M", str(role.shards), *sizes


def _loaded(plan: Plan) -> Iterator[Row]:
    for name, held in plan.loaded.items():
        where = "" if held.on_device else " (host)"
        nothing = ("-",) * (len(ROLES) - 4)
        yield name, f"{held.parameters / 1e6:.1f} M", "1", gib(held.bytes) + where, *nothing


def _phase(phase: PhasePlan) -> Row:
    memory = phase.activations, phase.caches, phase.gradients, phase.gathered, phase.peak
    return phase.name, *map(gib, memory), f"{phase.tflop:.0f}", f"{phase.attention:.0%}", f"{phase.seconds:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], first: int = 24) -> Iterator[str]:
    width = max(13, *(len(cell) + 1 for row in (head, *rows) for cell in row[1:]))
    for row in (head, *rows):
        yield f"  {row[0]:{first}}" + "".join(f"{cell:>{width}}" for cell in row[1:])


def _verdict(plan: Plan) -> str:
    return "fits" if plan.fits else "does not fit"
