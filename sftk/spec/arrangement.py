"""How many ranks hold one copy of a model, share one sample and take which part of a batch: arithmetic on a recipe alone."""

from __future__ import annotations

import math

import attrs

from sftk.errors import Problem, SpecError
from sftk.functional.token_split import degree_problem
from sftk.spec.parallel import ModelParallel, Shard
from sftk.spec.schema import AUTO, Recipe
from sftk.spec.wording import counted


@attrs.frozen(kw_only=True)
class Arrangement:
    """The ranks of a run, arranged twice: for weights (copies x shards, for each role) and for samples (data x sequence).

    In both, ranks of the last factor are consecutive, and so of one node where there is room. `sftk plan` and the runner
    both read it.

    Args:
        ranks: of the run.
        sequence: ranks that share one sample.
        per_rank: samples of one forward pass.
        accumulation: forward passes of one update.
        shards: role to the ranks that hold one copy of its weights.
    """

    ranks: int
    sequence: int
    per_rank: int
    accumulation: int
    shards: dict[str, int]

    @property
    def data(self) -> int:
        """Ranks, or groups of ranks, with samples of their own."""
        return self.ranks // self.sequence


def arrange_ranks(recipe: Recipe, ranks: int, node: int) -> Arrangement:
    """Arranges ranks as a recipe's `parallel` and `batch` say.

    Args:
        recipe: one stage.
        ranks: of the run.
        node: of them on each node.

    Raises:
        SpecError: they do not divide so; every reason, with its path.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> recipe = load_recipe("recipes/wan-14b/dmd.yaml", ["models.generator.parallel.shard=node"])[0].recipe
        >>> found = arrange_ranks(recipe, ranks=32, node=8)
        >>> found.accumulation, found.shards
        (2, {'generator': 8, 'real_score': 32, 'fake_score': 32})
    """
    problems: list[Problem] = []
    section = recipe.parallel
    if ranks % section.sequence:
        message = f"sequence {section.sequence} does not divide {counted(ranks, 'rank')}"
        problems.append(Problem(path=("parallel", "sequence"), message=message))
    shards = {}
    for role, policy in policies(recipe).items():
        shards[role] = count_shards(policy, ranks, node)
        if ranks % shards[role]:
            own = recipe.models[role].parallel.shard is not None
            path = ("models", role, "parallel", "shard") if own else ("parallel", "shard")
            problems.append(Problem(path=path, message=f"shard {shards[role]} does not divide {counted(ranks, 'rank')}"))
    per_rank, accumulation = 1, 1
    try:
        per_rank, accumulation = recipe.batch.split(max(ranks // section.sequence, 1))
    except ValueError as error:
        problems.append(Problem(path=("batch",), message=str(error), hint="change batch.global, batch.per_rank or the ranks"))
    problems = list({(p.path, p.message): p for p in problems}.values())
    if problems:
        raise SpecError(problems)
    return Arrangement(ranks=ranks, sequence=section.sequence, per_rank=per_rank, accumulation=accumulation, shards=shards)


def policies(recipe: Recipe) -> dict[str, ModelParallel]:
    """Role to its whole policy, for roles that have weights of their own; an average lies where its source does."""
    return {
        role: model.parallel.over(recipe.parallel)
        for role, model in recipe.models.items()
        if not model.ready_made and model.ema_of is None
    }


def least_ranks(recipe: Recipe) -> int:
    """The fewest ranks that a recipe's `parallel` can be arranged over.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> options = ["parallel={shard: 4, sequence: 3}", "models.real_score.parallel.shard=6"]
        >>> [least_ranks(load_recipe("recipes/dmd.yaml", taken)[0].recipe) for taken in ([], options)]
        [1, 12]
    """
    shards = (policy.shard for policy in policies(recipe).values())
    return math.lcm(recipe.parallel.sequence, *(shard for shard in shards if isinstance(shard, int)))


def count_shards(policy: ModelParallel, ranks: int, node: int) -> int:
    """Ranks that hold one copy of a model's weights.

    Example:
        >>> [count_shards(ModelParallel(shard=shard), ranks=16, node=8) for shard in ("all", "node", 4)]
        [16, 8, 4]
    """
    shard: Shard | None = policy.shard
    assert shard is not None
    return ranks if shard == "all" else min(node, ranks) if shard == "node" else shard


def sequence_problems(recipe: Recipe) -> list[Problem]:
    """Models whose attention heads or tokens a sequence group cannot share out.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> sequence_problems(load_recipe("recipes/dmd.yaml")[0].recipe)
        []
    """
    found, latents = [], recipe.latents
    for role, model in recipe.models.items():
        if model.size is None or model.size == AUTO:
            continue
        _, rows, columns = model.config.patch_size
        tokens = (latents.height // rows) * (latents.width // columns)
        problem = degree_problem(recipe.parallel.sequence, model.config.num_heads, tokens)
        if problem is not None:
            found.append(Problem(path=("parallel", "sequence"), message=f"{problem} ({role!r})"))
    return found
