"""Puts a measured stage on GPUs: memory, communication and time, by arithmetic alone."""

from __future__ import annotations

import attrs
import torch

from sftk.data.held import Held
from sftk.functional.attention import FLASH
from sftk.runtime.acceleration import compiles
from sftk.runtime.plan_memory import RolePlan, plan_roles
from sftk.runtime.plan_pass import PhasePass, StagePass
from sftk.runtime.plan_rates import GIB, Gpu
from sftk.runtime.plan_traffic import Traffic, phase_traffic
from sftk.spec.arrangement import Arrangement
from sftk.spec.recipe import Stage

SLACK = 0.03
"""Share of a GPU's memory that the allocator loses to fragments; our choice."""
SLOWER = {"bf16": 1.0, "tf32": 2.0, "fp32": 10.0, "fp64": 10.0}
"""How much slower than in bf16 products are: data sheets give tf32 half of its rate, fp32 and fp64 67 TFLOP/s of 680."""

FUSED, UNFUSED = 0.3, 1.6
"""Time of what lies between products, as a multiple of moving what its operators read and write: compiled, where few of them
touch memory, and eager. Measured at the shapes of Wan 1.3B on an H200 and an H100."""


@attrs.frozen(kw_only=True)
class PhasePlan:
    """One phase on one rank; with `share_rollout`, one of its turns.

    Args:
        every: steps to an update, in the mean.
        activations: most bytes besides weights, optimiser and gradients; caches are among them.
        caches: bytes of cached keys and values. gradients: bytes. gathered: bytes of weights gathered from other ranks.
        peak: most bytes of the whole process in this phase.
        tflop: of one update on one rank, 10^12 floating-point operations. attention: the share of attention in them.
        traffic: what a rank sends in one update.
        seconds: one update; communication is not hidden in it. communication_seconds: that part.
    """

    name: str
    every: float
    activations: float
    caches: float
    gradients: float
    gathered: float
    peak: float
    tflop: float
    attention: float
    traffic: tuple[Traffic, ...]
    seconds: float
    communication_seconds: float

    @property
    def communication(self) -> float:
        """Bytes that a rank sends in one update."""
        return sum(row.sent for row in self.traffic)

    @property
    def exchanged(self) -> float:
        """Of these, bytes that go to ranks which share its samples."""
        return sum(row.sent for row in self.traffic if row.kind == "all_to_all")


@attrs.frozen(kw_only=True)
class Plan:
    """A stage on given GPUs.

    Args:
        gpus: how many, `node` of them on each node. gpu: which.
        per_rank: samples of one pass. accumulation: passes of one update. sequence: ranks that share one sample.
        roles: what each rank holds of them.
        loaded: codecs, text encoders and built-in modules, by their place in the recipe; each rank holds them whole.
        peak: most bytes on one rank's device; `budget` is what there is for it. host: bytes that a rank keeps in the host's
            memory.
        step_seconds: mean over a cycle of phases. advice: what would make it fit, or nothing.
    """

    stage: str
    gpus: int
    gpu: str
    node: int
    per_rank: int
    accumulation: int
    sequence: int
    roles: dict[str, RolePlan]
    phases: tuple[PhasePlan, ...]
    peak: float
    host: float
    budget: float
    step_seconds: float
    loaded: dict[str, Held] = attrs.field(factory=dict)
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it should fit."""
        return self.peak <= self.budget

    @property
    def parameters(self) -> dict[str, int]:
        """Role to how many weights it has."""
        return {role: one.parameters for role, one in self.roles.items()}

    def on_device(self, part: str) -> float:
        """Bytes of one part of all roles (`weights`, `optimizer`, `average`) on each rank's device."""
        return sum(getattr(one, part) for one in self.roles.values() if not one.offload)


def lay_out(stage: Stage, measured: StagePass, found: Arrangement, device: Gpu, gpu_name: str, node: int) -> Plan:
    """Puts a measured stage on GPUs: arithmetic alone, see docs/plan.md for the formulas.

    Args:
        stage: from `load_recipe`. measured: its pass, with one rank's samples. found: its ranks.
        device: of that name. node: GPUs of a node.
    """
    roles = plan_roles(stage.recipe, measured, found)
    held = sum((0.0 if one.offload else one.held) + (one.gathered if one.until == "run" else 0.0) for one in roles.values())
    held += sum(one.bytes for one in measured.loaded.values() if one.on_device)
    phases = tuple(_phase(phase, measured, roles, held, stage, found, device, node) for phase in measured.phases)
    return Plan(
        stage=stage.name,
        gpus=found.ranks,
        gpu=gpu_name,
        node=node,
        per_rank=found.per_rank,
        accumulation=found.accumulation,
        sequence=found.sequence,
        roles=roles,
        phases=phases,
        peak=max(phase.peak for phase in phases),
        host=sum(one.held for one in roles.values() if one.offload)
        + sum(one.bytes for one in measured.loaded.values() if not one.on_device),
        budget=device.memory * GIB * (1 - SLACK),
        step_seconds=sum(phase.seconds / phase.every for phase in phases),
        loaded=measured.loaded,
    )


def _phase(
    phase: PhasePass,
    measured: StagePass,
    roles: dict[str, RolePlan],
    held: float,
    stage: Stage,
    found: Arrangement,
    device: Gpu,
    node: int,
) -> PhasePlan:
    recipe, work, micro = stage.recipe, phase.work, found.accumulation
    gathered = _gathered(phase, roles, {role: recipe.models[role].ema_of or role for role in phase.calls})
    gradients = sum(roles[role].gradients for role in phase.roles)
    share = gradients / max(*phase.peaks, 1)
    activations = phase.peak(0.0)
    most = max(phase.peak(share), activations + gradients if micro > 1 else 0.0)  # earlier micro-batches left theirs
    traffic = phase_traffic(phase, measured, recipe, found, node)
    sending = sum(row.seconds(device) for row in traffic)
    flash = any(model.backend in FLASH for model in recipe.models.values())
    compute = device.matrix_seconds(work.gemm, work.attention, work.attention_backward, flash=flash)
    moved = work.moved * (FUSED if compiles(recipe, torch.device("cuda")) else UNFUSED)
    busy = micro * (SLOWER[recipe.precision] * compute + moved / (device.bandwidth * 1e12))
    return PhasePlan(
        name=phase.name,
        every=phase.every,
        activations=activations,
        caches=phase.caches,
        gradients=gradients,
        gathered=gathered,
        peak=held + gathered + most,
        tflop=micro * work.flops / 1e12,
        attention=(work.attention + work.attention_backward) / max(work.flops, 1.0),
        traffic=traffic,
        seconds=busy + sending,
        communication_seconds=sending,
    )


def _gathered(phase: PhasePass, roles: dict[str, RolePlan], sources: dict[str, str]) -> float:
    """Bytes of weights that are gathered at once in a phase: calls come one after the other; an average is as its source."""
    called = [roles[source] for source in sources.values() if source in roles]
    kept = sum(one.gathered for one in called if one.until == "phase")
    return kept + max((one.gathered for one in called if one.until == "call"), default=0.0)
