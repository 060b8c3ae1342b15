"""What would make a plan fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import attrs

from sftk.core.replay import is_replayable
from sftk.data.held import Held
from sftk.errors import SpecError
from sftk.runtime.plan_layout import Plan
from sftk.runtime.plan_rates import GIB
from sftk.spec.arrangement import sequence_problems
from sftk.spec.recipe import Stage
from sftk.spec.schema import Checkpoint, Recipe

MOST = (2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried."""
LEANER: tuple[Checkpoint, ...] = ("none", "products", "selective", "full")
"""Activation checkpoints from the one that keeps most to the one that computes most again."""
WORTH = 0.05
"""Share of the peak from which a context, a codec or a text encoder is worth a remark."""
_LEAVE = {
    "text": "embed the prompts before, with `sftk data embed`, and the text encoder takes no memory",
    "codec": "`device: cpu` keeps the codec in the host's memory",
}


@attrs.frozen(kw_only=True)
class Change:
    """A change of settings: roles to checkpoint (and how) or to hold in bf16, phases to replay, 8-bit optimisers, weights
    sharded over all GPUs, and how many of these share a sample."""

    text: str = ""
    checkpoint: tuple[str, ...] = ()
    kind: Checkpoint = "full"
    half: tuple[str, ...] = ()
    replay: tuple[str, ...] = ()
    eight_bit: bool = False
    shard: bool = False
    sequence: int = 1

    def of(self, stage: Stage, plan: Plan, gpus: int) -> Stage:
        """The stage with it. The batch changes with the GPUs, so that each has the plan's share of it."""
        recipe = stage.recipe
        models = dict(recipe.models)
        for role in self.checkpoint:
            models[role] = attrs.evolve(models[role], checkpoint=self.kind)
        for role in self.half:
            models[role] = attrs.evolve(models[role], dtype="bf16")
        phases = tuple(attrs.evolve(p, backward="replay") if p.name in self.replay else p for p in recipe.phases)
        optimizers = recipe.optimizers
        if self.eight_bit:
            optimizers = {role: attrs.evolve(section, use="adamw_8bit") for role, section in optimizers.items()}
        parallel = attrs.evolve(recipe.parallel, sequence=max(self.sequence, recipe.parallel.sequence))
        if self.shard:
            parallel = attrs.evolve(parallel, shard="all")
            models = {role: attrs.evolve(m, parallel=attrs.evolve(m.parallel, shard=None)) for role, m in models.items()}
        share = plan.per_rank * plan.accumulation * (gpus // parallel.sequence)
        batch = attrs.evolve(recipe.batch, per_rank=plan.per_rank, global_=share)
        changed = attrs.evolve(recipe, models=models, phases=phases, optimizers=optimizers, parallel=parallel, batch=batch)
        return attrs.evolve(stage, recipe=changed)


def advise(stage: Stage, plan: Plan, try_: Callable[[Stage, int], Plan]) -> tuple[str, ...]:
    """What would make a plan fit: each change alone, else all of them, else on more GPUs; and where a window would help.

    Of the checkpoints alone it is the one that computes least again; together with others, `full`.

    Args:
        stage: as planned. plan: does not fit. try_: plans a stage on so many GPUs.
    """
    recipe, options = stage.recipe, _changes(stage, plan)

    def peak(change: Change, gpus: int) -> float:
        try:
            return try_(change.of(stage, plan, gpus), gpus).peak
        except SpecError:  # groups of so many ranks, or weights that a graph needs whole
            return float("inf")

    def fitting(changes: Iterable[Change]) -> Iterator[Change]:
        return (change for change in changes if peak(change, plan.gpus) <= plan.budget)

    alone = [*islice(fitting(_checkpoints(recipe)), 1), *fitting(change for change in options if not change.checkpoint)]
    found = [f"{change.text} would make it fit" for change in alone]
    if not found:
        together = " and ".join(change.text for change in options)
        everything = _together(options)
        if len(options) > 1 and peak(everything, plan.gpus) <= plan.budget:
            found.append(f"{together} together would make it fit")
        else:
            found.append(_on_more_gpus(recipe, plan, everything, together, peak))
    found += [f"{name}: {_LEAVE[name.rpartition('.')[2]]}" for name, held in plan.loaded.items() if _is_large(held, plan)]
    largest = max(plan.phases, key=lambda phase: phase.peak)
    section = next(phase for phase in recipe.phases if phase.name == largest.name.partition(".")[0])
    if section.with_.get("window") is None and largest.caches > WORTH * largest.peak:
        found.append(f"a `window` in the phase {largest.name} would shrink its context, at most {largest.caches / GIB:.1f} GiB")
    return tuple(found)


def _is_large(held: Held, plan: Plan) -> bool:
    return held.on_device and held.bytes > WORTH * plan.peak


def _changes(stage: Stage, plan: Plan) -> list[Change]:
    recipe = stage.recipe
    trained = _trained(recipe)
    backbones = {role: model for role, model in recipe.models.items() if model.size is not None}
    frozen = tuple(role for role, model in backbones.items() if role not in trained and model.dtype == "fp32")
    kept = tuple(p.name for p in recipe.phases if p.backward == "graph" and is_replayable(stage.graphs[p.name]))
    wide = tuple(role for role, section in recipe.optimizers.items() if section.use != "adamw_8bit")
    options = _checkpoints(recipe)[-1:]
    if kept:
        options.append(Change(text="backward: replay in " + ", ".join(kept), replay=kept))
    if frozen:
        options.append(Change(text="dtype: bf16 on " + ", ".join(frozen), half=frozen))
    if wide:
        options.append(Change(text="use: adamw_8bit for " + ", ".join(wide), eight_bit=True))
    if any(role.shards < plan.gpus for role in plan.roles.values()):
        options.append(Change(text=f"sharding over the {plan.gpus} GPUs (parallel.shard=all)", shard=True))
    return options


def _checkpoints(recipe: Recipe) -> list[Change]:
    """Leaner checkpoints of what is trained, from the one that keeps most on; the last is `full`."""
    models = {role: model for role, model in recipe.models.items() if role in _trained(recipe) and model.size is not None}
    options = []
    for index, kind in enumerate(LEANER):
        wasteful = tuple(role for role, model in models.items() if LEANER.index(model.checkpoint) < index)
        if wasteful:
            options.append(Change(text=f"checkpoint: {kind} on " + ", ".join(wasteful), checkpoint=wasteful, kind=kind))
    return options


def _trained(recipe: Recipe) -> set[str]:
    return {role for phase in recipe.phases for role in phase.roles}


def _together(options: list[Change]) -> Change:
    made = Change()
    for change in options:
        given = {f.name: getattr(change, f.name) for f in attrs.fields(Change) if getattr(change, f.name) != f.default}
        made = attrs.evolve(made, **given)
    return made


def _on_more_gpus(recipe: Recipe, plan: Plan, everything: Change, together: str, peak: Callable[[Change, int], float]) -> str:
    """What the fewest GPUs are that would do: sharding first, then sharing each sample, too."""
    with_it = f", with {together}," if together else ""
    for sequence in (recipe.parallel.sequence, *(n for n in MOST if n > recipe.parallel.sequence)):
        if sequence_problems(attrs.evolve(recipe, parallel=attrs.evolve(recipe.parallel, sequence=sequence))):
            continue
        shared = f" parallel.sequence={sequence}" if sequence > recipe.parallel.sequence else ""
        for gpus in MOST:
            if gpus <= plan.gpus or gpus % sequence:
                continue
            if peak(attrs.evolve(everything, shard=True, sequence=sequence), gpus) <= plan.budget:
                return f"sharding over {gpus} GPUs (--gpus {gpus} parallel.shard=all{shared}){with_it} would make it fit"
    return f"no number of these GPUs up to {MOST[-1]} holds it; take a larger GPU or fewer frames"
