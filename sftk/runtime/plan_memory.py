"""What each rank holds of every role: weights, gradients, averages, optimiser states, and weights gathered from other ranks."""

from __future__ import annotations

from typing import Literal

import attrs

from sftk.runtime.plan_models import RoleSize
from sftk.runtime.plan_pass import PhasePass, StagePass
from sftk.runtime.plan_traffic import gather_bytes
from sftk.spec.arrangement import Arrangement, policies
from sftk.spec.lowp import holds_half
from sftk.spec.schema import Recipe

STATE_BYTES = 2
"""Of AdamW with 8-bit states, for each weight; their scales, one for 256, are left out."""


@attrs.frozen(kw_only=True)
class RolePlan:
    """One role on one rank, in bytes.

    Args:
        parameters: of the whole model. shards: ranks that hold one copy of it. offload: its shards lie in the host's memory.
        weights, optimizer, average: this rank's shards (weights that are held in bfloat16, too, among them), on its device or,
            with `offload`, in the host's memory.
        gradients: most that there is at once; on the device.
        gathered: most of its weights that are there at once beside its own, gathered from other ranks.
        until: the end of what frees it: a call of the model, a phase, or only the run.
    """

    parameters: int
    shards: int
    offload: bool
    weights: float
    optimizer: float
    average: float
    gradients: float
    gathered: float
    until: Literal["call", "phase", "run"] = "call"

    @property
    def held(self) -> float:
        """Bytes that are there all the time, wherever they lie."""
        return self.weights + self.optimizer + self.average


def plan_roles(recipe: Recipe, measured: StagePass, found: Arrangement) -> dict[str, RolePlan]:
    """What a rank holds of each role; the first rank, which never holds less than another.

    Args:
        recipe: one stage. measured: its pass. found: its ranks.
    """
    known = policies(recipe)
    return {
        role: _role(role, size, recipe, measured, found, bool(known[role].offload), known[role].reshard is not False)
        for role, size in measured.roles.items()
    }


def is_sharded(recipe: Recipe, role: str, found: Arrangement) -> bool:
    """Whether FSDP2 holds a role's weights."""
    return found.shards[role] > 1 or bool(policies(recipe)[role].offload)


def _role(
    role: str, size: RoleSize, recipe: Recipe, measured: StagePass, found: Arrangement, offload: bool, reshard: bool
) -> RolePlan:
    shards = found.shards[role]
    sharded = is_sharded(recipe, role, found)
    own = (size.padded(shards) if sharded else size.parameters) / shards
    section = recipe.optimizers.get(role)
    state = 0 if section is None else STATE_BYTES if section.use == "adamw_8bit" else 2 * size.bytes_each
    trained = [phase for phase in measured.phases if role in phase.roles]
    gradients = max((gradient_bytes(role, phase, size, recipe, found) for phase in trained), default=0.0)
    gathered, each = 0.0, gather_bytes(recipe, role, size)
    if sharded and not reshard:
        gathered = each * size.padded(shards)
    elif sharded:  # one block computes while the next is fetched; what no block holds stays until the call ends
        scattered = max(4, size.bytes_each) if trained else 0
        block = size.block(shards)
        gathered = each * size.units[0].padded(shards) + (2 * each + scattered) * block
    return RolePlan(
        parameters=size.parameters,
        shards=shards,
        offload=offload,
        weights=own * (size.bytes_each + (2 if holds_half(recipe, role) and not sharded else 0)),
        optimizer=own * state,
        average=own * size.bytes_each if role in recipe.ema else 0.0,
        gradients=gradients,
        gathered=gathered,
        until="call" if reshard else "phase" if role in recipe.optimizers else "run",
    )


def gradient_bytes(role: str, phase: PhasePass, size: RoleSize, recipe: Recipe, found: Arrangement) -> float:
    """Most bytes of a role's gradients in a phase, on one rank's device.

    FSDP2 keeps them whole, and wide, between backward passes that share nothing; autograd keeps them whole, and narrow, in a
    backward pass through several calls; else only a block's are whole, and counted with what is gathered.
    """
    wide, shards = max(4, size.bytes_each), found.shards[role]
    if not is_sharded(recipe, role, found):
        return size.parameters * size.bytes_each
    own = 0.0 if policies(recipe)[role].offload else size.padded(shards) / shards * size.bytes_each
    passes, calls = 0, 0
    for visits in phase.visits:
        tasks = [visit.task for visit in visits.get(role, ()) if visit.task is not None]
        passes = max(passes, len(set(tasks)))
        calls = max([calls, *(tasks.count(task) for task in set(tasks))])
    if recipe.parallel.accumulate == "whole" and (found.accumulation > 1 or passes > 1):
        return max(own, size.padded(1) * wide)
    if calls > 1:
        return own + size.padded(1) * gather_bytes(recipe, role, size)
    return own
