"""Plans a stage on given GPUs, without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from sftk.errors import SpecError
from sftk.models.rope import rope_table
from sftk.runtime.plan_advice import advise
from sftk.runtime.plan_layout import Plan, lay_out
from sftk.runtime.plan_loaded import loaded_weights
from sftk.runtime.plan_memory import is_sharded
from sftk.runtime.plan_pass import StagePass, pass_stage
from sftk.runtime.plan_rates import NODE, gpu
from sftk.spec.arrangement import Arrangement
from sftk.spec.rank_checks import check_ranks
from sftk.spec.recipe import Stage


@attrs.define
class Planner:
    """Plans of stages that differ little: passes over meta tensors are made once for all that are alike.

    Args:
        gpu_name: see `sftk.runtime.plan_rates`. node: GPUs of a node.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> planner = Planner("h100")
        >>> (stage,) = load_recipe("recipes/digits/df.yaml")
        >>> [planner.plan(stage, gpus).accumulation for gpus in (1, 4)], len(planner.passes)
        ([1, 1], 2)
    """

    gpu_name: str
    node: int = NODE
    passes: list[tuple[Stage, frozenset[str], StagePass]] = attrs.field(factory=list)

    def plan(self, stage: Stage, gpus: int) -> Plan:
        """Plans a stage as its recipe's `parallel` and `batch` say, as the runner reads them.

        Raises:
            SpecError: the ranks or the batch do not divide so, or the GPU is unknown.
        """
        device, found = gpu(self.gpu_name), check_ranks(stage, gpus, self.node)
        return lay_out(stage, self._passed(stage, found), found, device, self.gpu_name, self.node)

    def _passed(self, stage: Stage, found: Arrangement) -> StagePass:
        """One rank's pass of a micro-batch; what only arithmetic reads of a recipe is left out of the comparison."""
        recipe = stage.recipe
        sharded = frozenset(role for role in found.shards if is_sharded(recipe, role, found))
        batch = attrs.evolve(recipe.batch, per_rank=found.per_rank, global_=found.per_rank)
        models = {role: attrs.evolve(model, parallel=type(model.parallel)()) for role, model in recipe.models.items()}
        parallel = type(recipe.parallel)(sequence=recipe.parallel.sequence)
        local = attrs.evolve(stage, recipe=attrs.evolve(recipe, batch=batch, models=models, parallel=parallel, optimizers={}))
        for known, roles, measured in self.passes:
            if known.recipe == local.recipe and known.graphs is local.graphs and roles == sharded:
                return measured
        rope_table.cache_clear()  # tables that an earlier pass left would not be counted
        measured = attrs.evolve(pass_stage(local, sharded=sharded), loaded=loaded_weights(stage))
        self.passes.append((local, sharded, measured))
        return self.passes[-1][-1]


def plan_stage(stage: Stage, *, gpus: int = 1, gpu_name: str = "h100", node: int = NODE, advice: bool = True) -> Plan:
    """Plans a stage.

    Args:
        stage: from `load_recipe`; its `parallel` says how ranks share weights and samples.
        gpus: ranks. gpu_name: see `sftk.runtime.plan_rates`. node: GPUs of a node.
        advice: also find out what would make it fit, where it does not.

    Raises:
        SpecError: the ranks or the batch do not divide so, or the GPU is unknown.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> plan = plan_stage(load_recipe("recipes/digits/df.yaml")[0])
        >>> plan.fits, plan.parameters
        (True, {'denoiser': 689776})
    """
    planner = Planner(gpu_name, node)
    found = planner.plan(stage, gpus)
    if found.fits or not advice:
        return found
    return attrs.evolve(found, advice=advise(stage, found, planner.plan))


def plan_counts(
    stage: Stage, counts: Sequence[int], *, gpu_name: str = "h100", node: int = NODE
) -> dict[int, Plan | SpecError]:
    """Plans a stage on several numbers of GPUs: the plan of each, or why there is none.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> found = plan_counts(load_recipe("recipes/digits/df.yaml")[0], [8, 24])
        >>> found[8].per_rank, str(found[24]).partition(" @ ")[0]
        (4, 'global 32 does not split into passes of 1 on each of 24 ranks')
    """
    planner = Planner(gpu_name, node)
    found: dict[int, Plan | SpecError] = {}
    for gpus in counts:
        try:
            found[gpus] = planner.plan(stage, gpus)
        except SpecError as error:
            found[gpus] = error
    return found
