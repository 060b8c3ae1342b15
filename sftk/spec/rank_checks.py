"""What of a recipe does not go with a number of ranks: how they divide, and graphs that need whole weights."""

from __future__ import annotations

from collections.abc import Mapping

from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.core.transform import FunctionTransform
from sftk.errors import Problem, SpecError
from sftk.spec.arrangement import Arrangement, arrange_ranks, policies
from sftk.spec.recipe import Stage
from sftk.spec.schema import Recipe


def check_ranks(stage: Stage, ranks: int, node: int) -> Arrangement:
    """Arranges ranks as a stage's recipe says.

    Args:
        stage: from `load_recipe`.
        ranks: of the run.
        node: of them on each node.

    Raises:
        SpecError: they do not divide so, or a graph needs weights whole that would be sharded; every reason, with its place.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> check_ranks(load_recipe("recipes/dmd.yaml")[0], ranks=4, node=4).per_rank
        4
    """
    try:
        found = arrange_ranks(stage.recipe, ranks, node)
        problems = whole_problems(stage.recipe, stage.graphs, found.shards)
        if problems:
            raise SpecError(problems)
    except SpecError as error:
        raise SpecError([stage.document.locate(problem) for problem in error.problems]) from error
    return found


def whole_roles(graph: Graph | Fold) -> dict[str, str]:
    """Role to the transform in a graph that needs all of its weights in every process.

    Example:
        >>> import sftk
        >>> whole_roles(Graph.from_spec("specs/discriminator.yaml", r1_weight=1.0, penalty="exact"))
        {'fake_score': 'gradient_penalty', 'discriminator': 'gradient_penalty'}
    """
    found: dict[str, str] = {}
    for node in graph.nodes:
        roles = dict(node.roles)
        if isinstance(node.op, Graph | Fold):
            found |= {roles[port]: name for port, name in whole_roles(node.op).items()}
        elif isinstance(node.op, FunctionTransform) and node.op.needs_whole(node.options):
            found |= dict.fromkeys(roles.values(), node.op.name)
    return found


def whole_problems(recipe: Recipe, graphs: Mapping[str, Graph], shards: Mapping[str, int]) -> list[Problem]:
    """Roles that would be sharded though a graph needs their weights whole.

    Args:
        recipe: one stage.
        graphs: phase to graph.
        shards: role to the ranks that hold one copy of it.
    """
    known, found = policies(recipe), []
    for index, phase in enumerate(recipe.phases):
        for port, name in (whole_roles(graphs[phase.name]) if phase.name in graphs else {}).items():
            role = phase.models.get(port, port)
            role = (recipe.models[role].ema_of if role in recipe.models else None) or role
            if role in known and (shards.get(role, 1) > 1 or known[role].offload):
                message = f"{name!r} differentiates {role!r} twice, which weights that are sharded or offloaded do not allow"
                hint = f"set models.{role}.parallel: {{shard: 1, offload: false}}, or let the phase do without"
                found.append(Problem(path=("phases", index, "graph"), message=message, hint=hint))
    return found
