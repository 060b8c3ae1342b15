"""A DMD generator step with one sample on one GPU, and with its tokens shared by several: seconds, peak memory, the plan.

    python benchmarks/sequence_parallel.py                     benchmarks/dmd_1.3b.yaml on 1 and 2 GPUs
    python benchmarks/sequence_parallel.py --degrees 1,2,4     and on 4
    python benchmarks/sequence_parallel.py --tiny              a tiny model on the CPU, to try the script

Prints a line of JSON for each setting: degree, weights held whole on each rank (`shard` 1) or sharded, seconds of each update
(the same samples, noise and exit steps in all settings, so that they may be compared one by one), the speed-up over one rank,
and the losses, which agree but for rounding. PyTorch's torchrun starts the ranks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import attrs
from rank_steps import TINY, Ranks, build_ranks, time_updates

from sftk.runtime.join import joined
from sftk.runtime.plan import plan_stage
from sftk.runtime.plan_rates import GIB
from sftk.spec.recipe import Stage, load_recipe

RECIPE = "benchmarks/dmd_1.3b.yaml"
MINUTES = 30
"""For each setting, at most."""


def stage_of(overrides: list[str]) -> Stage:
    """The benchmark's stage, with its generator phase alone, at each step."""
    (stage,) = load_recipe(RECIPE, overrides)
    phase = attrs.evolve(stage.recipe.phases[0], every=1)
    optimizers = {role: stage.recipe.optimizers[role] for role in phase.roles}
    return attrs.evolve(stage, recipe=attrs.evolve(stage.recipe, phases=(phase,), optimizers=optimizers))


def measure(overrides: list[str], updates: int, out: Path) -> None:
    """Runs on every rank; the first writes down what they found."""
    stage = stage_of(overrides)
    with joined(stage.recipe.device, stage.recipe.parallel.timeout) as world:
        built, facts = build_ranks(stage, world)
        for found in time_updates(stage, built, updates):
            if world.rank == 0:
                out.write_text(json.dumps(facts | found))


def main() -> None:
    """Prints a line of JSON for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", default="1,2", help="numbers of ranks that share a sample")
    parser.add_argument("--updates", type=int, default=4, help="that are timed; more see more exit steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as compile=true")
    given = parser.parse_args()
    if given.rank_out is not None:  # one of the ranks
        measure(given.overrides, given.updates, given.rank_out)
        return
    alone: list[float] = []
    for degree in map(int, given.degrees.split(",")):
        for shard in ("1",) if degree == 1 else ("1", "all"):
            parallel = [f"parallel.sequence={degree}", f"parallel.shard={shard}"]
            overrides = [*(TINY if given.tiny else []), *parallel, *given.overrides]
            arguments = ["--updates", str(given.updates), *overrides]
            found: dict[str, Any] = Ranks(__file__, degree, arguments).result(60 * MINUTES)
            if "problem" in found:
                raise SystemExit(found["problem"])
            seconds = found["seconds"]["generator"]
            alone = alone or seconds
            plan = plan_stage(stage_of(overrides), gpus=degree)
            row = {
                "sequence": degree,
                "shard": shard,
                **{name: found[name] for name in ("device", "torch", "peak_gib")},
                "seconds": seconds,
                "losses": found["losses"]["generator"],
                "speedup": round(sum(alone) / sum(seconds), 3),
                "planned": {"seconds": round(plan.phases[0].seconds, 3), "gib": round(plan.peak / GIB, 2)},
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
