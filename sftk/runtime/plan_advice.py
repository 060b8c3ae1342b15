"""What would make a plan fit."""

from __future__ import annotations

from typing import Any

import attrs

from sftk.core.replay import is_replayable
from sftk.runtime.plan_layout import Plan, arrange
from sftk.runtime.plan_pass import StagePass, pass_stage
from sftk.runtime.plan_rates import GIB, Sharding, gpu
from sftk.spec.arrangement import sequence_problems
from sftk.spec.recipe import Stage

MOST = (2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried."""
WORTH = 0.05
"""Share of the peak from which a context is worth a remark."""


@attrs.frozen(kw_only=True)
class Change:
    """A change of settings: roles to checkpoint or hold in bf16, phases to replay, an 8-bit optimiser, GPUs to shard over and
    of these, how many share a sample."""

    text: str = ""
    checkpoint: tuple[str, ...] = ()
    half: tuple[str, ...] = ()
    replay: tuple[str, ...] = ()
    eight_bit: bool = False
    gpus: int = 0
    sequence: int = 1


@attrs.define
class _Trials:
    """Peaks of a stage with changes: what the changes leave alone is not measured again."""

    stage: Stage
    plan: Plan
    node: int
    measured: dict[tuple[Any, ...], StagePass]

    def peak(self, change: Change) -> float:
        recipe, sequence = self.stage.recipe, max(change.sequence, self.stage.recipe.parallel.sequence)
        kind = change.checkpoint, change.half, change.replay, sequence
        models = dict(recipe.models)
        for role in change.checkpoint:
            models[role] = attrs.evolve(models[role], checkpoint="full")
        for role in change.half:
            models[role] = attrs.evolve(models[role], dtype="bf16")
        phases = tuple(attrs.evolve(p, backward="replay") if p.name in change.replay else p for p in recipe.phases)
        parallel = attrs.evolve(recipe.parallel, sequence=sequence)
        tried = attrs.evolve(self.stage, recipe=attrs.evolve(recipe, models=models, phases=phases, parallel=parallel))
        if kind not in self.measured:
            self.measured[kind] = pass_stage(tried)
        gpus, sharding = max(change.gpus, self.plan.gpus), _sharding(change, self.plan)
        device, bits = gpu(self.plan.gpu), change.eight_bit or self.plan.eight_bit
        return arrange(tried, self.measured[kind], gpus, device, self.plan.gpu, sharding, self.node, bits).peak


def advise(stage: Stage, measured: StagePass, plan: Plan, node: int) -> tuple[str, ...]:
    """What would make a plan fit: each change alone, else all of them, else on more GPUs; and where a window would help.

    Args:
        stage: with the batch of one rank. measured: its pass. plan: does not fit.
    """
    recipe = stage.recipe
    trained = {role for phase in recipe.phases for role in phase.roles}
    backbones = {role: model for role, model in recipe.models.items() if model.size is not None}
    wasteful = tuple(role for role, model in backbones.items() if role in trained and model.checkpoint == "none")
    frozen = tuple(role for role, model in backbones.items() if role not in trained and model.dtype == "fp32")
    kept = tuple(p.name for p in recipe.phases if p.backward == "graph" and is_replayable(stage.graphs[p.name]))
    options = []
    if wasteful:
        options.append(Change(text="checkpoint: full on " + ", ".join(wasteful), checkpoint=wasteful))
    if kept:
        options.append(Change(text="backward: replay in " + ", ".join(kept), replay=kept))
    if frozen:
        options.append(Change(text="dtype: bf16 on " + ", ".join(frozen), half=frozen))
    if not plan.eight_bit:
        options.append(Change(text="an 8-bit optimiser (--eight-bit)", eight_bit=True))
    if plan.sharding == "replicate" and plan.gpus > 1:
        options.append(Change(text=f"sharding over the {plan.gpus} GPUs (--sharding fsdp)", gpus=plan.gpus))
    trials = _Trials(stage, plan, node, {((), (), (), recipe.parallel.sequence): measured})
    found = [f"{change.text} would make it fit" for change in options if trials.peak(change) <= plan.budget]
    if not found:
        together = " and ".join(change.text for change in options)
        gpus = max((c.gpus for c in options), default=0)
        everything = Change(checkpoint=wasteful, half=frozen, replay=kept, eight_bit=True, gpus=gpus)
        if len(options) > 1 and trials.peak(everything) <= plan.budget:
            found.append(f"{together} together would make it fit")
        else:
            found.append(_on_more_gpus(trials, everything, together))
    largest = max(plan.phases, key=lambda phase: phase.peak)
    section = next(phase for phase in recipe.phases if phase.name == largest.name.partition(".")[0])
    if section.with_.get("window") is None and largest.caches > WORTH * largest.peak:
        found.append(f"a `window` in the phase {largest.name} would shrink its context, at most {largest.caches / GIB:.1f} GiB")
    return tuple(found)


def _on_more_gpus(trials: _Trials, everything: Change, together: str) -> str:
    """What the fewest GPUs are that would do: sharding first, then sharing each sample, too."""
    plan, recipe = trials.plan, trials.stage.recipe
    with_it = f", with {together}," if together else ""
    for sequence in (recipe.parallel.sequence, *(n for n in MOST if n > recipe.parallel.sequence)):
        if sequence_problems(attrs.evolve(recipe, parallel=attrs.evolve(recipe.parallel, sequence=sequence))):
            continue
        shared = f" and parallel.sequence={sequence}" if sequence > recipe.parallel.sequence else ""
        for gpus in MOST:
            change = attrs.evolve(everything, gpus=gpus, sequence=sequence)
            if gpus > plan.gpus and gpus >= sequence and trials.peak(change) <= plan.budget:
                return f"sharding over {gpus} GPUs (--gpus {gpus} --sharding fsdp){shared}{with_it} would make it fit"
    return f"no number of these GPUs up to {MOST[-1]} holds it; take a larger GPU or fewer frames"


def _sharding(change: Change, plan: Plan) -> Sharding:
    return "fsdp" if change.gpus else plan.sharding
