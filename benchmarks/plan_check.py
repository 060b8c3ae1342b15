"""Measured against planned: runs settings of a recipe on a GPU and prints peak memory and time beside `sftk plan`'s.

On a machine without a GPU it runs a tiny model on the CPU, where only the estimates and the running are shown, not a peak.

    python benchmarks/plan_check.py                      three settings of benchmarks/dmd_1.3b.yaml, full checkpoints
    python benchmarks/plan_check.py --tiny               the same at the size of the embedded task
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import torch

from sftk.data.sources import source
from sftk.runtime.build import build_stage
from sftk.runtime.plan import plan_stage
from sftk.runtime.plan_layout import Plan
from sftk.runtime.plan_rates import GIB
from sftk.runtime.step import TrainingStep
from sftk.spec.recipe import load_recipe

FULL = ("models.generator.checkpoint=full", "models.fake_score.checkpoint=full", "models.generator.half_copy=false")
SETTINGS = {
    "3 frames": ["latents.frames=3"],
    "21 frames": [],
    "3 frames without checkpoints": [
        "latents.frames=3",
        "models.generator.checkpoint=none",
        "models.fake_score.checkpoint=none",
    ],
}
"""From what the weights alone take to where activations count most."""
STEPS = 3
"""The first one makes the optimisers' states; the peak and the times are of the others."""
TINY = "{dim: 96, ffn_dim: 384, num_heads: 3, num_layers: 4, in_dim: 16, out_dim: 16, freq_dim: 96, text_dim: 32, text_len: 4}"


def measure(overrides: list[str], device: torch.device) -> tuple[float, dict[str, float], Plan]:
    """Peak bytes of steady steps (0 on the CPU), seconds of a step with both phases and of the critic's, and the plan."""
    (stage,) = load_recipe("benchmarks/dmd_1.3b.yaml", ["phases.generator.every=2", *FULL, *overrides])
    recipe, built = stage.recipe, build_stage(stage, device, {})
    data = source(recipe.data.use)
    shape = {key: getattr(recipe.latents, key) for key in ("frames", "channels", "height", "width")}
    sample = data.build(**shape, seed=recipe.seed, options=recipe.data.with_)[0]
    step = TrainingStep(recipe, built, itertools.repeat(data.collate([sample])))
    seconds: dict[str, float] = {}
    for number in range(STEPS):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds["critic" if number % 2 else "generator and critic"] = time.perf_counter() - begin
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else 0.0), seconds, plan_stage(stage)


def main() -> None:
    """Prints a line of JSON for each setting; about a minute on an H100."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    tiny = parser.parse_args().tiny
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = [f"models.{role}.size={TINY}" for role in ("generator", "real_score", "fake_score")]
    small += ["latents.height=8", "latents.width=8", "data.with={text_len: 4, text_dim: 32}"]
    for name, overrides in SETTINGS.items():
        peak, seconds, plan = measure([*overrides, *(small if tiny else [])], device)
        critic = sum(phase.seconds for phase in plan.phases if phase.name == "critic")
        both = sum(phase.seconds for phase in plan.phases)
        print(
            json.dumps(
                {
                    "setting": name,
                    "measured_gib": round(peak / GIB, 2),
                    "planned_gib": round(plan.peak / GIB, 2),
                    "off_by": round(plan.peak / peak - 1, 3) if peak else None,
                    "measured_seconds": {kind: round(found, 3) for kind, found in seconds.items()},
                    "planned_seconds": {"generator and critic": round(both, 3), "critic": round(critic, 3)},
                }
            ),
            flush=True,
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
