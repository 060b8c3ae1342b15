"""Plans a stage on given GPUs, without weights and without a GPU."""

from __future__ import annotations

import attrs

from sftk.errors import SpecError
from sftk.models.rope import rope_table
from sftk.runtime.plan_advice import advise
from sftk.runtime.plan_layout import Plan, arrange
from sftk.runtime.plan_pass import pass_stage
from sftk.runtime.plan_rates import Sharding, gpu
from sftk.spec.recipe import Stage


def plan_stage(
    stage: Stage,
    *,
    gpus: int = 1,
    gpu_name: str = "h100",
    sharding: Sharding | None = None,
    node: int = 8,
    eight_bit: bool = False,
) -> Plan:
    """Plans a stage.

    Args:
        stage: from `load_recipe`.
        gpus: ranks; so many as the recipe's `parallel.sequence` says share samples, the others have their own.
        gpu_name: see `sftk.runtime.plan_rates`.
        sharding: `replicate` holds everything on each rank, `fsdp` shards weights, gradients and optimiser over all of them,
            `hsdp` over those of a node. None takes replicate for one GPU, fsdp for one node and hsdp beyond.
        node: GPUs of a node.
        eight_bit: the optimiser's states take a byte each.

    Raises:
        SpecError: the batch cannot be split over the GPUs, or the GPU is unknown.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> plan = plan_stage(load_recipe("recipes/digits/df.yaml")[0])
        >>> plan.fits, plan.parameters
        (True, {'denoiser': 689776})
    """
    rope_table.cache_clear()  # tables that an earlier pass left would not be counted
    if sharding is None:
        sharding = "replicate" if gpus == 1 else "fsdp" if gpus <= node else "hsdp"
    device = gpu(gpu_name)
    batch, sequence = stage.recipe.batch, stage.recipe.parallel.sequence
    try:
        if gpus % sequence:
            raise ValueError(f"parallel.sequence {sequence} does not divide {gpus} GPUs")
        per_rank, accumulation = batch.split(gpus // sequence)
    except ValueError as error:
        raise SpecError(f"{error}; change --gpus, batch.global or batch.per_rank") from error
    micro = attrs.evolve(batch, per_rank=per_rank, global_=per_rank * accumulation)
    local = attrs.evolve(stage, recipe=attrs.evolve(stage.recipe, batch=micro))
    measured = pass_stage(local)
    found = arrange(local, measured, gpus, device, gpu_name, sharding, node, eight_bit)
    if found.fits:
        return found
    return attrs.evolve(found, advice=advise(local, measured, found, node))
