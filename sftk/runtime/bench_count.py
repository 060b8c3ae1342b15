"""What the cases of a benchmark compute, counted on meta tensors by the code that plans a stage."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from sftk.runtime.bench_cases import BACKWARD, FORWARD, ROLLOUT, pass_inputs, producers, rollout_graph, rollout_values
from sftk.runtime.plan_models import meta_stage
from sftk.runtime.plan_pass import CountedPort, PhasePass, VisitLog, pass_stage
from sftk.runtime.plan_trace import Work
from sftk.spec.recipe import Stage

Counts = dict[tuple[str, int | None], Work]
"""Case and exit step to what it computes."""


def count_cases(stage: Stage, names: Sequence[str], sequence: int = 1) -> Counts:
    """The work of cases: of phases at each of their exit steps, with all micro-batches of an update.

    Args:
        stage: from `load_recipe`. names: of the cases; phases that others of them read are counted, too.
        sequence: ranks that share a sample; the work is that of the first.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> counts = count_cases(load_recipe("recipes/digits/df.yaml")[0], ["df", "forward"])
        >>> {name: round(work.flops / 1e9, 1) for (name, exit_step), work in counts.items()}
        {'df': 45.1, 'forward': 16.9}
    """
    parallel = attrs.evolve(stage.recipe.parallel, sequence=sequence)  # a benchmark's one process has all tokens of a sample
    stage = attrs.evolve(stage, recipe=attrs.evolve(stage.recipe, parallel=parallel))
    meta = meta_stage(stage)
    counts: Counts = {}
    times = stage.recipe.batch.split()[1]
    turns = stage.turns
    asked = [turn for turn in turns if turn.name in names]
    read = [producer for turn in asked for producer in producers(turns, turn)]
    for phase in pass_stage(stage, meta, [turn for turn in turns if turn in asked or turn in read]).phases:
        for index, work in enumerate(phase.exits):
            total = counts[phase.name, index if len(phase.exits) > 1 else None] = Work()
            total.add(work, times)
    graph, role = rollout_graph(stage)
    for name in names:
        if name not in (ROLLOUT, FORWARD, BACKWARD):
            continue
        meta.models[role].requires_grad_(name == BACKWARD)
        port = CountedPort(meta, role, VisitLog(), PhasePass(name=name, every=1, roles=()))
        with meta.traced() as trace, torch.set_grad_enabled(name == BACKWARD):
            if name == ROLLOUT:
                graph.run(rollout_values(graph, meta.batch), {"denoiser": port})
            else:
                flow = port(*pass_inputs(meta.batch))[0]
                if name == BACKWARD:
                    flow.backward(torch.empty_like(flow))
        counts[name, None] = trace.work
    return counts
