"""Puts a measured stage on GPUs: memory, communication and time, by arithmetic alone."""

from __future__ import annotations

import attrs

from sftk.runtime.plan_pass import PhasePass, StagePass
from sftk.runtime.plan_rates import GIB, NETWORK, Gpu, Sharding
from sftk.spec.recipe import Stage

SLACK = 0.03
"""Share of a GPU's memory that the allocator loses to fragments; our choice."""
SLOWER = {"bf16": 1.0, "tf32": 2.0, "fp32": 10.0, "fp64": 10.0}
"""How much slower than in bf16 products are: data sheets give tf32 half of its rate, fp32 and fp64 67 TFLOP/s of 680."""


@attrs.frozen(kw_only=True)
class PhasePlan:
    """One phase on one rank; with `share_rollout`, one of its turns.

    Args:
        every: steps to an update, in the mean.
        activations: most bytes besides weights, optimiser and gradients; caches are among them.
        caches: bytes of cached keys and values. gradients: bytes.
        peak: most bytes of the whole process in this phase.
        tflop: of one update on one rank, 10^12 floating-point operations. attention: the share of attention in them.
        communication: bytes that a rank sends in one update; `exchanged`: of these, to ranks that share its samples.
        seconds: one update; communication is not hidden in it. communication_seconds: that part.
    """

    name: str
    every: float
    activations: float
    caches: float
    gradients: float
    peak: float
    tflop: float
    attention: float
    communication: float
    exchanged: float
    seconds: float
    communication_seconds: float


@attrs.frozen(kw_only=True)
class Plan:
    """A stage on given GPUs.

    Args:
        parameters: role to how many. weights, optimizer, ema: bytes on one rank.
        peak: most bytes on one rank; `budget` is what there is for it.
        step_seconds: mean over a cycle of phases. advice: what would make it fit, or nothing.
    """

    stage: str
    gpus: int
    gpu: str
    sharding: Sharding
    per_rank: int
    accumulation: int
    parameters: dict[str, int]
    weights: float
    optimizer: float
    ema: float
    phases: tuple[PhasePlan, ...]
    peak: float
    budget: float
    step_seconds: float
    eight_bit: bool = False
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it should fit."""
        return self.peak <= self.budget


def arrange(
    stage: Stage, measured: StagePass, gpus: int, device: Gpu, gpu_name: str, sharding: Sharding, node: int, eight_bit: bool
) -> Plan:
    """Puts a measured stage on GPUs: arithmetic alone, see docs/plan.md for the formulas."""
    recipe, roles = stage.recipe, measured.roles
    shards = {"replicate": 1, "fsdp": gpus, "hsdp": min(gpus, node)}[sharding]
    updated = {role for phase in measured.phases for role in phase.roles}
    weights = sum(size.parameters * size.bytes_each for size in roles.values()) / shards
    state = 2 if eight_bit else 8
    optimizer = sum(roles[role].parameters * state for role in updated) / shards
    ema = sum(roles[role].parameters * roles[role].bytes_each for role in recipe.ema) / shards
    # Two blocks are gathered at once in bf16 (one computes, one is fetched), and one's gradients are being reduced in fp32.
    gathered = 0.0 if shards == 1 else max(size.block_bytes / size.bytes_each for size in roles.values()) * (2 * 2 + 4)
    static = weights + optimizer + ema + gathered
    slower = SLOWER[recipe.precision]
    per_rank, accumulation = recipe.batch.split()
    flash = any(model.backend == "flash" for model in recipe.models.values())
    phases = tuple(
        _phase(phase, measured, static, gpus, shards, device, accumulation, slower, flash, node, recipe.parallel.sequence)
        for phase in measured.phases
    )
    return Plan(
        stage=stage.name,
        gpus=gpus,
        gpu=gpu_name,
        sharding=sharding,
        per_rank=per_rank,
        accumulation=accumulation,
        parameters={role: size.parameters for role, size in roles.items()},
        weights=weights,
        optimizer=optimizer,
        ema=ema,
        phases=phases,
        peak=max(phase.peak for phase in phases),
        budget=device.memory * GIB * (1 - SLACK),
        eight_bit=eight_bit,
        step_seconds=sum(phase.seconds / phase.every for phase in phases),
    )


def _phase(
    phase: PhasePass,
    measured: StagePass,
    static: float,
    gpus: int,
    shards: int,
    device: Gpu,
    accumulation: int,
    slower: float,
    flash: bool,
    node: int,
    sequence: int,
) -> PhasePlan:
    work = phase.work
    gradients = sum(measured.roles[role].parameters * measured.roles[role].bytes_each for role in phase.roles)
    sent = communication(phase, measured, gpus, shards, accumulation)
    exchanged = accumulation * work.sent
    sending = sum(
        size / ((device.link if ranks <= node else NETWORK) * 1e9) for size, ranks in ((sent, gpus), (exchanged, sequence))
    )
    compute = device.matrix_seconds(work.gemm, work.attention, work.attention_backward, flash=flash)
    busy = accumulation * (slower * compute + work.moved / (device.bandwidth * 1e12))
    held = 1.0 if accumulation > 1 else 0.0  # gradients of earlier micro-batches are there from the start
    activations = phase.peak(0.0)
    most = max(phase.peak(1 / shards), held * (activations + gradients / shards))
    return PhasePlan(
        name=phase.name,
        every=phase.every,
        activations=activations,
        caches=phase.caches,
        gradients=gradients / shards,
        peak=static + most,
        tflop=accumulation * work.flops / 1e12,
        attention=(work.attention + work.attention_backward) / max(work.flops, 1.0),
        communication=sent + exchanged,
        exchanged=exchanged,
        seconds=busy + sending,
        communication_seconds=sending,
    )


def communication(phase: PhasePass, measured: StagePass, gpus: int, shards: int, accumulation: int) -> float:
    """Bytes that a rank sends in one update of a phase.

    A ring sends (n - 1) / n of a tensor to gather or to scatter it over n ranks, and twice that to reduce it on all. Sharded
    weights are gathered in bf16 by every call and by every backward pass; gradients are reduced in fp32 once an update (over
    the shards by each micro-batch, as FSDP2 does without accumulation in full).

    Example:
        >>> from sftk.runtime.plan_models import RoleSize
        >>> size = RoleSize(parameters=8, bytes_each=4, block_bytes=32)
        >>> phase = PhasePass(name="p", every=1, roles=("m",), calls={"m": 2.0})
        >>> communication(phase, StagePass(roles={"m": size}, phases=(phase,)), gpus=2, shards=2, accumulation=1)
        32.0
        >>> communication(phase, StagePass(roles={"m": size}, phases=(phase,)), gpus=2, shards=1, accumulation=1)
        32.0
    """
    share, copies = (shards - 1) / shards, gpus // shards
    calls = sum(phase.calls.get(role, 0.0) * size.parameters for role, size in measured.roles.items())
    trained = sum(measured.roles[role].parameters for role in phase.roles)
    gathered = accumulation * calls * 2 * share
    scattered = accumulation * trained * 4 * share
    reduced = 2 * trained * 4 / shards * (copies - 1) / copies
    return gathered + scattered + reduced
