"""Runs every phase of a stage on meta tensors and measures what it computes and keeps; no weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sftk.core.state import detached
from sftk.data.held import Held
from sftk.functional.exit_key import ExitKey
from sftk.models.branch import ClassifierBranch
from sftk.runtime.build import training_graph
from sftk.runtime.plan_models import MetaStage, RoleSize, meta_stage
from sftk.runtime.plan_trace import Work
from sftk.runtime.plan_visits import Visit
from sftk.runtime.port import make_port
from sftk.spec.recipe import Stage
from sftk.spec.turns import Turn, cycle


@attrs.define(kw_only=True)
class PhasePass:
    """One micro-batch of a turn, the mean over its exit steps.

    Args:
        name, roles: of the turn. every: steps to a turn, in the mean.
        peaks: bytes of gradients to the most other bytes alive with them, weights and optimiser apart; over all exit steps.
        work: the mean. exits: of each exit step; one where none is drawn.
        visits: role to its forward and backward passes, in order, for each exit step.
        caches: most bytes that a call was given as cached keys and values.
    """

    name: str
    every: float
    roles: tuple[str, ...]
    peaks: dict[int, int] = attrs.field(factory=dict)
    work: Work = attrs.field(factory=Work)
    exits: list[Work] = attrs.field(factory=list)
    visits: list[dict[str, list[Visit]]] = attrs.field(factory=list)
    caches: int = 0

    @property
    def calls(self) -> dict[str, float]:
        """Role to how often it is called, forward and backward passes counted each; the mean."""
        roles = dict.fromkeys(role for visits in self.visits for role in visits)
        return {role: sum(len(visits.get(role, ())) for visits in self.visits) / len(self.visits) for role in roles}

    def peak(self, share: float = 1.0) -> float:
        """Most bytes of activations and that share of the gradients."""
        return max(alive + share * gradients for gradients, alive in self.peaks.items())


@attrs.frozen(kw_only=True)
class StagePass:
    """A stage on meta tensors: sizes of its roles, its phases, and what is loaded beside the roles, see `loaded_weights`."""

    roles: dict[str, RoleSize]
    phases: tuple[PhasePass, ...]
    loaded: dict[str, Held] = attrs.field(factory=dict)


def pass_stage(
    stage: Stage, meta: MetaStage | None = None, turns: Sequence[Turn] | None = None, sharded: Collection[str] = ()
) -> StagePass:
    """Runs a stage's turns on meta tensors, each once for every exit step.

    Args:
        stage: from `load_recipe`.
        meta: its models, where they are there already. turns: which ones; None is all.
        sharded: roles that FSDP2 shards, see `meta_stage`.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/digits/df.yaml")
        >>> (phase,) = pass_stage(stage).phases
        >>> phase.name, phase.calls
        ('df', {'denoiser': 2.0})
    """
    meta, turns = meta or meta_stage(stage, sharded), stage.turns if turns is None else turns
    times, outputs = cycle(stage.turns), {}
    return StagePass(roles=meta.sizes, phases=tuple(_pass_turn(meta, turn, times, outputs) for turn in turns))


def _pass_turn(meta: MetaStage, turn: Turn, times: dict[str, int], outputs: dict[str, dict[str, Any]]) -> PhasePass:
    recipe, batch, models, phase = meta.stage.recipe, meta.batch, meta.models, turn.phase
    graph, tape = training_graph(turn)
    found = PhasePass(
        name=turn.name, every=math.lcm(*(t.every for t in meta.stage.turns)) / times[turn.name], roles=phase.roles
    )
    for role, module in models.items():
        module.requires_grad_(role in phase.roles)
    values = {name: batch[name] for name in (*graph.inputs, *graph.optional) if name in batch}
    for name, origin in phase.in_.items():
        producer, dot, output = origin.partition(".")
        values[name] = outputs[producer][output] if dot else batch[origin]
    roles = {port: phase.models.get(port, port) for port in graph.ports}
    exits = 1
    while len(found.exits) < exits:  # the first turn finds out how many there are
        key = ExitKey(seed=recipe.seed, phase=phase.name, samples=batch["key"].samples, exit_index=len(found.exits))
        values["key"] = key
        found.visits.append({})
        log = VisitLog(found.visits[-1])
        ports = {
            port: models[role] if recipe.models[role].codec is not None else CountedPort(meta, role, log, found)
            for port, role in roles.items()
        }
        with meta.traced() as trace:
            for tensor in values.values():
                if isinstance(tensor, Tensor):
                    trace.track(tensor)
            out = graph.run(values, ports)
            log.sync = True
            out[phase.loss].backward()
            once, log.sync = trace.work.attention - trace.work.attention_again, False
            tape.pull_back(log.share)
            trace.work.attention_again = trace.work.attention - once  # replay calls again what ran without a graph
        outputs[phase.name] = detached(out)
        exits = max(key.choices, default=1)
        for gradients, alive in trace.peaks.items():
            found.peaks[gradients] = max(found.peaks.get(gradients, 0), alive)
        found.exits.append(trace.work)
        del out
    for work in found.exits:
        found.work.add(work, 1 / exits)
    return found


@attrs.define
class VisitLog:
    """Writes down when models are called. `sync`: ranks would share gradients in a backward pass that begins now."""

    visits: dict[str, list[Visit]] = attrs.field(factory=dict)
    sync: bool = False

    def share(self) -> None:
        """Ranks share gradients from here on."""
        self.sync = True

    def called(self, role: str, given: list[Tensor], made: list[Tensor]) -> None:
        """A forward pass of a role, and the backward passes that will come through its outputs."""
        own, through, seen = self.visits.setdefault(role, []), any(t.requires_grad for t in given), set[int]()
        own.append(Visit())

        def visited(_: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            if task not in seen:
                seen.add(task)
                own.append(Visit(task=task, through=through, sync=self.sync))

        for tensor in made:
            if tensor.requires_grad:
                tensor.register_hook(visited)


class CountedPort:
    """A port that opens the trace's copies of weights for a call, and writes down calls.

    Args:
        meta: the models. role: which of them. log: notes calls. found: notes the most bytes of a call's cache.
    """

    def __init__(self, meta: MetaStage, role: str, log: VisitLog, found: PhasePass):
        self.role, self.active, self.log, self.found = role, meta.active, log, found
        module = meta.models[role]
        self.port = module if meta.stage.recipe.models[role].ready_made else make_port(module, None)
        self.trains = any(p.requires_grad for p in module.parameters())
        if isinstance(module, ClassifierBranch):
            self.features_at = module.features_at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trace = self.active.trace
        trace.caching = True
        cache = kwargs.get("cache")
        if cache is not None:
            tensors = {id(t): t for t in tree_leaves(cache) if isinstance(t, Tensor)}
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            self.found.caches = max(self.found.caches, size)
        out = self.port(*args, **kwargs)
        trace.caching = False
        trace.casts.clear()
        given, made = ([t for t in tree_leaves(found) if isinstance(t, Tensor)] for found in ((args, kwargs), out))
        self.log.called(self.role, given, made)
        return out
