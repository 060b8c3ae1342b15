"""One rank of a run of several processes: `python rank_job.py JOBS`, under torchrun's environment variables.

JOBS is a JSON file: a list of `{"name", "recipe", "overrides", "steps"}`, run one after the other in the same processes. For
each, the first rank writes `<name>.pt` beside it: the metrics of every step, and the whole weights and averages at the end;
every rank writes `<name>.<rank>.pt`, what it drew. Without the variables it is one process, which gives the reference.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sftk.runtime.build import build_stage
from sftk.runtime.join import joined
from sftk.runtime.loader import make_loader
from sftk.runtime.mesh import make_mesh
from sftk.runtime.shards import whole
from sftk.runtime.step import TrainingStep
from sftk.runtime.world import World
from sftk.spec.recipe import load_recipe


def run_job(job: dict[str, Any], world: World, folder: Path) -> None:
    """Trains a job's recipe for its steps and writes what came of it."""
    (stage,) = load_recipe(job["recipe"], job["overrides"])
    cpu = torch.device("cpu")
    mesh = make_mesh(stage.recipe, world, cpu)
    built = build_stage(stage, cpu, {}, mesh)
    loader = make_loader(stage.recipe, stage.path, rank=mesh.data_rank, world=mesh.data_world)
    step = TrainingStep(stage.recipe, built, iter(loader))
    metrics, drawn = [], []
    for index in range(job["steps"]):
        if world.rank == 1 and job["name"] == f"hang_at_{index}":
            time.sleep(60)
        metrics.append({name: value.item() for name, value in step(index).items()})
        drawn.append(draws(step, index))
    states = {role: built.modules[role].state_dict() for role in built.optimizers}
    states |= {f"{role}.ema": ema.state_dict() for role, ema in built.emas.items()}
    found = {name: {key: whole(tensor) for key, tensor in state.items()} for name, state in states.items()}
    torch.save(drawn, folder / f"{job['name']}.{mesh.rank}.pt")
    if mesh.first:
        torch.save({"metrics": metrics, "weights": found}, folder / f"{job['name']}.pt")


def draws(step: TrainingStep, index: int) -> dict[str, Any]:
    """What decided a step on this rank: noise by global sample, and the exit steps."""
    found: dict[str, Any] = {"noise": {}, "exits": []}
    for (at, phase), (_, micros) in step.recent.items():
        for values in micros if at == index else ():
            noise = values.get("noise", values.get("x0"))  # a phase that takes another's rollout has that
            found["noise"] |= {(phase, s): noise[i] for i, s in enumerate(values["key"].samples)}
            found["exits"].append((phase, values["key"].integers("exit", 0, 1000, 4)))
    return found


def run_jobs(path: Path) -> None:
    """Runs the jobs of a file."""
    with joined("cpu", minutes=0.3 if "hang" in path.read_text() else 3.0) as world:
        for job in json.loads(path.read_text()):
            run_job(job, world, path.parent)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_jobs(Path(sys.argv[1]))
