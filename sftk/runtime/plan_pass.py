"""Runs every phase of a stage on meta tensors and measures what it computes and keeps; no weight is loaded."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sftk.data.builtins import ready_made
from sftk.functional.keys import Key
from sftk.models.branch import ClassifierBranch
from sftk.models.weights import DTYPES
from sftk.runtime.build import construct, training_graph
from sftk.runtime.parallelize import parallelize
from sftk.runtime.plan_blocks import Active, measure_blocks
from sftk.runtime.plan_trace import HalfPrecision, Trace, Work
from sftk.runtime.port import make_port
from sftk.runtime.sequence import SequenceGroup, share_sequence
from sftk.runtime.shapes import meta_batch
from sftk.spec.recipe import Stage
from sftk.spec.schema import Recipe


@attrs.frozen(kw_only=True)
class RoleSize:
    """A role's weights: how many, bytes of each, bytes of its largest block (or of all, without blocks)."""

    parameters: int
    bytes_each: int
    block_bytes: int


@attrs.define(kw_only=True)
class PhasePass:
    """One micro-batch of a phase, the mean over its exit steps.

    Args:
        name, every, roles: of the phase.
        peaks: bytes of gradients to the most other bytes alive with them, weights and optimiser apart; over all exit steps.
        work: the mean.
        calls: role to how often it is called, forward and backward passes counted each; the mean.
        caches: most bytes that a call was given as cached keys and values.
    """

    name: str
    every: int
    roles: tuple[str, ...]
    peaks: dict[int, int] = attrs.field(factory=dict)
    work: Work = attrs.field(factory=Work)
    calls: dict[str, float] = attrs.field(factory=dict)
    caches: int = 0

    def peak(self, share: float = 1.0) -> float:
        """Most bytes of activations and that share of the gradients."""
        return max(alive + share * gradients for gradients, alive in self.peaks.items())


@attrs.frozen(kw_only=True)
class StagePass:
    """A stage on meta tensors: sizes of its roles, and its phases."""

    roles: dict[str, RoleSize]
    phases: tuple[PhasePass, ...]


class ExitKey(Key):
    """A key whose draws named `exit` give `exit_index`, and all others the largest number."""

    exit_index = 0
    exits = 1

    def integers(self, name: str, low: int, high: int, count: int) -> tuple[int, ...]:
        if name != "exit":
            return (high - 1,) * count
        type(self).exits = high - low
        return (low + min(type(self).exit_index, high - low - 1),) * count


def pass_stage(stage: Stage) -> StagePass:
    """Runs a stage's phases on meta tensors, each once for every exit step.

    Args:
        stage: from `load_recipe`.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/digits/df.yaml")
        >>> (phase,) = pass_stage(stage).phases
        >>> phase.name, phase.calls
        ('df', {'denoiser': 2.0})
    """
    recipe, device = stage.recipe, torch.device("meta")
    active = Active(Trace())
    half = HalfPrecision(torch.bfloat16, lambda: active.trace) if recipe.precision == "bf16" else None
    models: dict[str, nn.Module] = {}
    sizes: dict[str, RoleSize] = {}
    for role, section in recipe.models.items():
        if section.ready_made:
            models[role] = ready_made(section.builtin, section.codec, device)
            continue
        with device:
            model = construct(recipe, section.ema_of or role).to(DTYPES[section.dtype])
        if section.ema_of is None:
            sizes[role] = _size(model)
        if half is not None:
            for block in getattr(model, "blocks", ()):
                half.around(block)
        share_sequence(model, SequenceGroup(name="", rank=0, degree=recipe.parallel.sequence))
        measure_blocks(parallelize(model, checkpoint=section.checkpoint), active)
        models[role] = model
    outputs: dict[str, dict[str, Any]] = {}
    batch = meta_batch(stage)
    phases = tuple(_pass_phase(stage, index, models, active, half, batch, outputs) for index in range(len(recipe.phases)))
    return StagePass(roles=sizes, phases=phases)


def _size(model: nn.Module) -> RoleSize:
    parameters = list(model.parameters())
    blocks = getattr(model, "blocks", None) or [model]
    block = max(sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks)
    return RoleSize(parameters=sum(p.numel() for p in parameters), bytes_each=parameters[0].element_size(), block_bytes=block)


def _pass_phase(
    stage: Stage,
    index: int,
    models: dict[str, nn.Module],
    active: Active,
    half: HalfPrecision | None,
    batch: dict[str, Any],
    outputs: dict[str, dict[str, Any]],
) -> PhasePass:
    recipe, phase = stage.recipe, stage.recipe.phases[index]
    graph, tape = training_graph(phase, stage.graphs[phase.name])
    found = PhasePass(name=phase.name, every=phase.every, roles=phase.roles)
    for role, module in models.items():
        module.requires_grad_(role in phase.roles)
    values = {name: batch[name] for name in (*graph.inputs, *graph.optional) if name in batch}
    for name, origin in phase.in_.items():
        producer, dot, output = origin.partition(".")
        values[name] = outputs[producer][output] if dot else batch[origin]
    exit_index, exits = 0, 1
    while exit_index < exits:  # the first turn finds out how many there are
        ExitKey.exit_index, ExitKey.exits = exit_index, 1
        active.trace = trace = Trace()
        values["key"] = ExitKey(seed=recipe.seed, phase=phase.name, samples=batch["key"].samples)
        calls: dict[str, float] = {}
        roles = {port: phase.models.get(port, port) for port in graph.ports}
        ports = {
            port: models[role]
            if recipe.models[role].codec is not None
            else _CountedPort(models, role, recipe, active, calls, found)
            for port, role in roles.items()
        }
        with trace, half or nullcontext():
            for tensor in values.values():
                if isinstance(tensor, Tensor):
                    trace.track(tensor)
            out = graph.run(values, ports)
            out[phase.loss].backward()
            tape.pull_back()
        outputs[phase.name] = {key: v.detach() if isinstance(v, Tensor) else v for key, v in out.items()}
        exits = ExitKey.exits
        for gradients, alive in trace.peaks.items():
            found.peaks[gradients] = max(found.peaks.get(gradients, 0), alive)
        found.work.add(trace.work, 1 / exits)
        for role, count in calls.items():
            found.calls[role] = found.calls.get(role, 0.0) + count / exits
        del out
        exit_index += 1
    return found


class _CountedPort:
    """A port that opens the trace's copies of weights for a call, and counts calls: with gradient, a backward pass, too."""

    def __init__(
        self,
        models: dict[str, nn.Module],
        role: str,
        recipe: Recipe,
        active: Active,
        calls: dict[str, float],
        found: PhasePass,
    ):
        self.role, self.active, self.calls, self.found = role, active, calls, found
        module = models[role]
        plain = recipe.models[role].ready_made
        self.port = module if plain else make_port(module, None)
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
        graph = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(out))
        self.calls[self.role] = self.calls.get(self.role, 0.0) + (2 if graph else 1)
        return out
