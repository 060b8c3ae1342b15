"""How long a checkpoint in the background holds training up, and how long it takes to restore: JSON, for one rank or several.

    python benchmarks/checkpoint.py /scratch/checkpoints
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py /scratch/checkpoints --steps 10 parallel.shard=all

The folder must be new or empty, and have room for three checkpoints (34 GB each for DMD at 1.3B without averages). `held_up` is
the time in which training waits: for the copy to the host, and by which steps are longer while files are written. The first
checkpoint also asks for the host's memory; `share_of_50_steps` is the second's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from sftk.runtime.checkpoint import last_checkpoint
from sftk.runtime.device import device_name
from sftk.runtime.join import joined
from sftk.runtime.stage import StageRun
from sftk.runtime.step import TrainingStep
from sftk.runtime.world import World
from sftk.spec.recipe import Stage, load_recipe

RECIPE = Path(__file__).with_name("dmd_1.3b.yaml")


def timed(call: Any, *arguments: Any, **options: Any) -> float:
    """Seconds until a call, and what it asked of the device, are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(stage: Stage, folder: Path, world: World, steps: int) -> dict[str, Any]:
    """Trains `steps` steps without a checkpoint and after each of two, then restores the second.

    The steps are such that every phase runs as often in each stretch.
    """
    run = StageRun(stage, folder, {}, world)
    step = TrainingStep(stage.recipe, run.built, iter(run.loader))

    def stretch() -> float:
        def go() -> None:
            for _ in range(steps):
                step(run.step)
                run.step += 1

        return timed(go)

    stretch()  # compiles, and gives the optimisers their states
    plain = stretch() / steps
    saves = []
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        staged = timed(run.save, wait=False)
        extra = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0
        began = time.perf_counter()
        slower = stretch() - plain * steps
        run.save_finished()
        written = time.perf_counter() - began
        saves.append(
            {
                "copy_seconds": round(staged, 3),
                "slower_seconds": round(slower, 3),
                "held_up_seconds": round(staged + max(slower, 0.0), 3),
                "seconds_until_visible": round(staged + written, 3),
                "extra_gpu_bytes": extra,
            }
        )
    saved = last_checkpoint(folder)
    assert saved is not None
    size = sum(file.stat().st_size for file in saved.iterdir())
    restored = timed(run.resume)
    return {
        "device": device_name(run.built.device),
        "torch": torch.__version__,
        "ranks": world.size,
        "bytes": size,
        "step_seconds": round(plain, 4),
        "gpu_peak_bytes": memory,
        "first": saves[0],
        "second": saves[1],
        "share_of_50_steps": round(saves[1]["held_up_seconds"] / (50 * plain), 5),
        "restore_seconds": round(restored, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--steps", type=int, default=5, help="of each stretch")
    options = parser.parse_args()
    (stage,) = load_recipe(options.recipe, ["checkpoint.keep=2", *options.overrides])
    with joined(stage.recipe.device, stage.recipe.parallel.timeout) as world:
        found = measure(stage, options.folder, world, options.steps)
        if world.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
