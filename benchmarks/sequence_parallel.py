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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import torch

from sftk.runtime.build import build_stage
from sftk.runtime.device import device_name, pick_device
from sftk.runtime.join import joined
from sftk.runtime.loader import make_loader
from sftk.runtime.mesh import make_mesh
from sftk.runtime.plan import plan_stage
from sftk.runtime.plan_rates import GIB
from sftk.runtime.step import TrainingStep
from sftk.spec.recipe import Stage, load_recipe

RECIPE = "benchmarks/dmd_1.3b.yaml"
TINY_SIZE = (
    "{dim: 96, ffn_dim: 384, num_heads: 4, num_layers: 2, in_dim: 16, out_dim: 16, freq_dim: 96, text_dim: 32, text_len: 4}"
)
TINY = [f"models.{role}.size={TINY_SIZE}" for role in ("generator", "real_score", "fake_score")]
TINY += ["latents.frames=6", "latents.height=8", "latents.width=8", "data.with={text_len: 4, text_dim: 32}", "device=cpu"]


def stage_of(overrides: list[str]) -> Stage:
    """The benchmark's stage, with its generator phase alone, at each step."""
    (stage,) = load_recipe(RECIPE, overrides)
    phase = attrs.evolve(stage.recipe.phases[0], every=1)
    optimizers = {role: stage.recipe.optimizers[role] for role in phase.roles}
    return attrs.evolve(stage, recipe=attrs.evolve(stage.recipe, phases=(phase,), optimizers=optimizers))


def measure(overrides: list[str], updates: int) -> dict[str, Any]:
    """Runs on every rank: the seconds and losses of each update after the first two, and the peak memory."""
    stage = stage_of(overrides)
    recipe = stage.recipe
    with joined(recipe.device, recipe.parallel.timeout) as world:
        device = pick_device(recipe.device)
        mesh = make_mesh(recipe, world, device)
        built = build_stage(stage, device, {}, mesh)
        with torch.no_grad():  # a fresh model's head is zero, and so would be every loss
            for module in built.modules.values():
                module.get_parameter("head.head.weight").fill_(0.02)
        loader = make_loader(recipe, rank=mesh.data_rank, world=mesh.data_world)
        step, seconds, losses = TrainingStep(recipe, built, iter(loader)), [], []
        for number in range(updates + 2):  # the first two allocate the optimiser's states and start the libraries
            if number == 2 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            mesh.sum(torch.zeros(1, device=device))  # all begin together
            _wait(device)
            begin = time.perf_counter()
            metrics = step(number)
            _wait(device)
            seconds.append(time.perf_counter() - begin)
            losses.append(metrics["generator/loss"].item())
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        found = mesh.gather((seconds[2:], peak))
        slowest = [max(each) for each in zip(*(s for s, _ in found), strict=True)]
        return {
            "device": device_name(device),
            "seconds": [round(s, 3) for s in slowest],
            "peak_gib": round(max(p for _, p in found) / GIB, 2),
            "losses": losses[2:],
            "rank": mesh.rank,
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def launch(overrides: list[str], ranks: int, updates: int) -> dict[str, Any]:
    """`measure` in `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        line = ["--standalone", f"--nproc-per-node={ranks}", __file__, "--out", str(out), "--updates", str(updates)]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *line, *overrides], check=True)
        return json.loads(out.read_text())


def main() -> None:
    """Prints a line of JSON for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", default="1,2", help="numbers of ranks that share a sample")
    parser.add_argument("--updates", type=int, default=4, help="that are timed; more see more exit steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as compile=true")
    given = parser.parse_args()
    if given.out is not None:  # one of the ranks
        found = measure(given.overrides, given.updates)
        if found["rank"] == 0:
            given.out.write_text(json.dumps(found))
        return
    alone: list[float] = []
    for degree in map(int, given.degrees.split(",")):
        for shard in ("1",) if degree == 1 else ("1", "all"):
            parallel = [f"parallel.sequence={degree}", f"parallel.shard={shard}"]
            overrides = [*(TINY if given.tiny else []), *parallel, *given.overrides]
            found = launch(overrides, degree, given.updates)
            found.pop("rank")
            seconds = found["seconds"]
            alone = alone or seconds
            plan = plan_stage(stage_of(overrides), gpus=degree)
            planned = {"seconds": round(plan.phases[0].seconds, 3), "gib": round(plan.peak / GIB, 2)}
            setting = {"sequence": degree, "shard": shard, "torch": torch.__version__}
            speedup = {"speedup": round(sum(alone) / sum(seconds), 3), "planned": planned}
            print(json.dumps(setting | found | speedup), flush=True)


if __name__ == "__main__":
    main()
