"""DMD at the sizes of Wan 2.1 on the GPUs of one node, with random weights, beside what `sftk plan` predicts.

    sh benchmarks/eight_gpus.sh                                      everything, on 8 GPUs, within ten minutes
    sh benchmarks/eight_gpus.sh --nproc 2 --parts a,c                two parts on two GPUs
    sh benchmarks/eight_gpus.sh --tiny --device cpu --nproc 4        a tiny model over gloo, to try the script

(a) weak scaling of a 1.3B student with a 14B teacher, one sample to a GPU, FSDP2 and HSDP; (b) student, teacher and critic of
14B, FSDP2 over all GPUs, 2, 4, 8 of them to a sample; (c) the rollout of one sample of a 14B student over 1, 2, 4, 8 GPUs; (d)
an asynchronous checkpoint of (b)'s critic while it trains. Prints a line of JSON for each setting as it ends, and a summary.
Each has a time limit and fails alone (`problem`), with what it had found by then; those of few GPUs run side by side.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
from rank_steps import TINY, Ranks, build_ranks, peak_gib, reset_peak, time_updates, wait

from sftk.functional.attention import FLASH
from sftk.runtime.bench_cases import ROLLOUT, Cases, rollout_graph
from sftk.runtime.bench_count import count_cases
from sftk.runtime.checkpoint_saver import Staging
from sftk.runtime.checkpoint_state import optimizer_parts, saved_models, shares, weight_parts
from sftk.runtime.checkpoint_storage import SHARES
from sftk.runtime.join import joined
from sftk.runtime.plan import plan_stage
from sftk.runtime.plan_rates import GIB, GPUS, gpu
from sftk.runtime.stage import StageRun
from sftk.runtime.step import TrainingStep
from sftk.runtime.world import World
from sftk.spec.recipe import Stage, load_recipe

RECIPE = str(Path(__file__).with_name("dmd_1.3b.yaml"))
ROLES = ("generator", "real_score", "fake_score")
LIMITS = {"a": 110, "b": 130, "c": 90, "d": 110}
"""Seconds for a setting of each part."""
FITTING = ("phases.generator.backward=replay", "parallel.accumulate=sharded", "models.generator.parallel.reshard=false")
"""How (b) is trained: one block's activations and no whole gradients, and a student that is gathered once for each update."""
REPEATS = 3
"""Timed rollouts, after one that is not."""


@attrs.frozen(kw_only=True)
class Setting:
    """Something to measure.

    Args:
        part: a to d. ranks: GPUs. sequence: that share a sample. shard: that hold one copy of the weights.
    """

    part: str
    ranks: int
    sequence: int = 1
    shard: int = 1

    @property
    def overrides(self) -> list[str]:
        """Of the recipe."""
        large = ("real_score",) if self.part == "a" else ROLES
        return [
            *(f"models.{role}.size=14b" for role in large),
            f"batch.global={self.ranks // self.sequence}",
            "batch.per_rank=1",
            f"parallel.sequence={self.sequence}",
            f"parallel.shard={self.shard}",
            "phases.generator.every=1",
            *(FITTING if self.part == "b" else ()),
            *(["models.generator.dtype=bf16"] if self.part == "c" else []),
        ]

    def stage(self, overrides: Sequence[str]) -> Stage:
        """The recipe's stage: whole, or only its critic's phase, or only its student."""
        (stage,) = load_recipe(RECIPE, [*self.overrides, *overrides])
        recipe = stage.recipe
        if self.part == "c":
            models = {"generator": recipe.models["generator"]}
            recipe = attrs.evolve(recipe, models=models, phases=recipe.phases[:1], optimizers={})
        elif self.part == "d":
            critic = tuple(phase for phase in recipe.phases if phase.name == "critic")
            models = {role: recipe.models[role] for role in ("generator", "fake_score")}
            recipe = attrs.evolve(
                recipe, models=models, phases=critic, optimizers={"fake_score": recipe.optimizers["fake_score"]}
            )
        return attrs.evolve(stage, recipe=recipe)


def rounds(gpus: int, parts: str) -> Iterator[list[Setting]]:
    """Settings that run side by side, the most telling ones first."""
    degrees = [degree for degree in (1, 2, 4, 8) if degree <= gpus]
    fewer = degrees[:-1]
    halves = [ranks for ranks in degrees[::-1] if ranks >= 4]
    wanted = [
        [Setting(part="b", ranks=gpus, sequence=gpus, shard=gpus)],
        [Setting(part="c", ranks=gpus, sequence=gpus)],
        [Setting(part="c", ranks=degree, sequence=degree) for degree in fewer],
        [Setting(part="a", ranks=degree, shard=degree) for degree in fewer],
        [Setting(part="a", ranks=gpus, shard=gpus)],
        [Setting(part="d", ranks=gpus, sequence=gpus, shard=gpus)],
        *([Setting(part="a", ranks=ranks, shard=ranks // 2)] for ranks in halves[:1]),
        *([Setting(part="b", ranks=gpus, sequence=degree, shard=gpus)] for degree in fewer[:0:-1]),
        *([Setting(part="a", ranks=ranks, shard=ranks // 2)] for ranks in halves[1:]),
    ]
    for settings in wanted:
        kept = [setting for setting in settings if setting.part in parts]
        if kept:
            yield kept


def measure(setting: Setting, overrides: list[str], updates: int, folder: Path, out: Path) -> None:
    """Runs on every rank; the first writes down what they found, again and again."""
    stage = setting.stage(overrides)
    found = {"a": _updates, "b": _updates, "c": _rollouts, "d": _checkpoint}[setting.part]
    with joined(stage.recipe.device, stage.recipe.parallel.timeout) as world:
        for row in found(stage, world, updates, folder):
            if world.rank == 0:
                out.write_text(json.dumps(row))


def _updates(stage: Stage, world: World, updates: int, folder: Path) -> Iterator[dict[str, Any]]:
    built, facts = build_ranks(stage, world)
    yield facts
    for found in time_updates(stage, built, updates):
        yield facts | found


def _rollouts(stage: Stage, world: World, updates: int, folder: Path) -> Iterator[dict[str, Any]]:
    graph, student = rollout_graph(stage)
    built, facts = build_ranks(stage, world)
    yield facts
    (case,) = Cases(stage, built, graph, student).make(ROLLOUT, [None])
    seconds = []
    for number in range(REPEATS + 1):
        reset_peak()
        built.mesh.sum(next(built.modules[student].parameters()).new_zeros(1))  # all begin together
        wait(built.device)
        begin = time.perf_counter()
        case.run()
        wait(built.device)
        seconds.append(round(max(built.mesh.gather(time.perf_counter() - begin)), 4))
        yield facts | {"first_seconds": seconds[0], "seconds": seconds[1:], "peak_gib": peak_gib(built.mesh), "done": number}


def _checkpoint(stage: Stage, world: World, updates: int, folder: Path) -> Iterator[dict[str, Any]]:
    """How long training stands still while its tensors are copied (the first time, when the host's memory is asked for, too),
    and how much slower its steps are while files are written: one save, as a disk may not hold two."""
    run = StageRun(stage, folder, {}, world)
    mesh, roles = run.built.mesh, ("fake_score",)
    step = TrainingStep(stage.recipe, run.built, iter(run.loader))

    def timed(call: Any) -> float:
        wait(mesh.device)
        begin = time.perf_counter()
        call()
        wait(mesh.device)
        return round(max(mesh.gather(time.perf_counter() - begin)), 3)

    def train() -> None:
        step(run.step)
        run.step += 1

    first, plain = timed(train), [timed(train) for _ in range(max(updates, 1))]
    parts = weight_parts(saved_models(run.built, roles), run.step) | optimizer_parts(run.built)
    given = {SHARES: shares(parts)}
    size = sum(share.local.numel() * share.local.element_size() for share in given[SHARES].values())
    found: dict[str, Any] = {
        "ranks": world.size,
        "bytes": sum(mesh.gather(size)),
        "first_seconds": first,
        "step_seconds": plain,
    }
    staging = Staging()
    found["copy_first_seconds"], found["copy_seconds"] = (timed(functools.partial(staging.stage, given)) for _ in range(2))
    yield found
    staging = None  # its memory goes to the save's own
    found["save_call_seconds"] = timed(lambda: run.save(wait=False))
    began = time.perf_counter()
    found["steps_while_writing"] = [timed(train) for _ in range(max(updates, 1))]
    slower = sum(found["steps_while_writing"]) - sum(plain)
    found["held_up_seconds"] = round(found["copy_seconds"] + max(slower, 0.0), 3)
    yield found
    run.save_finished()
    yield found | {"seconds_until_visible": round(time.perf_counter() - began, 3)}


def planned(setting: Setting, overrides: list[str], gpu_name: str, node: int) -> dict[str, Any]:
    """What the planner says of a setting."""
    stage = setting.stage(overrides)
    if setting.part == "c":
        device, work = gpu(gpu_name), count_cases(stage, [ROLLOUT], setting.sequence)[ROLLOUT, None]
        flash = stage.recipe.models["generator"].backend in FLASH
        seconds = device.matrix_seconds(work.gemm, work.attention, 0.0, flash=flash)
        seconds += work.moved / (device.bandwidth * 1e12) + work.sent / (device.link * 1e9)
        return {"seconds": round(seconds, 3), "tflop": round(work.flops / 1e12, 1)}
    plan = plan_stage(stage, gpus=setting.ranks, gpu_name=gpu_name, node=node, advice=False)
    if setting.part == "d":
        return {"bytes_of_a_rank": round(plan.roles["fake_score"].weights + plan.roles["fake_score"].optimizer)}
    sent = {phase.name: round(phase.communication / GIB, 2) for phase in plan.phases}
    seconds = {phase.name: round(phase.seconds, 3) for phase in plan.phases}
    return {"seconds": seconds, "sent_gib": sent, "peak_gib": round(plan.peak / GIB, 2), "fits": plan.fits}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Weak scaling of (a) against one GPU, by phase; speed-up of (c) over one GPU."""
    efficiency: dict[str, Any] = {}
    speedup: dict[int, float] = {}
    whole = {(r["part"], r["ranks"], r["shard"]): r for r in rows if r["part"] in "ac" and r.get("seconds")}
    for (part, ranks, shard), row in whole.items():
        alone = whole.get((part, 1, 1))
        if alone is None:
            continue
        if part == "c":
            speedup[ranks] = round(min(alone["seconds"]) / min(row["seconds"]), 3)
            continue
        kind = f"{'fsdp' if shard == ranks else 'hsdp'} x {ranks}"
        shares = {name: sum(alone["seconds"][name]) / sum(taken) for name, taken in row["seconds"].items() if taken}
        efficiency[kind] = {name: round(share, 3) for name, share in shares.items()}
    return {"part": "summary", "weak_scaling": efficiency, "rollout_speedup": speedup}


def main() -> None:
    """Prints a line of JSON for each setting, and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=8, choices=(1, 2, 4, 8), help="GPUs, or processes on the CPU")
    parser.add_argument("--parts", default="a,b,c,d", help="which, such as a,c")
    parser.add_argument("--seconds", type=float, default=590, help="for everything")
    parser.add_argument("--updates", type=int, default=1, help="timed steps, after one that is not")
    parser.add_argument("--gpu", default="h200", choices=sorted(GPUS), help="for the predictions")
    parser.add_argument("--folder", type=Path, help="for the checkpoint [default: a temporary one]")
    parser.add_argument("--out", type=Path, help="a file that gets the lines, too")
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as models.generator.backend=flash")
    given = parser.parse_args()
    if given.rank_out is not None:  # one of the ranks
        setting = Setting(**json.loads(given.setting))
        measure(setting, given.overrides, given.updates, given.folder, given.rank_out)
        return
    overrides = [*(TINY if given.tiny else []), f"device={given.device}", *given.overrides]
    until = time.monotonic() + given.seconds
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if given.out is not None:
            given.out.write_text("".join(json.dumps(each) + "\n" for each in rows))

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for settings in rounds(given.nproc, given.parts):
            for row in _run(settings, overrides, given, folder, until):
                tell(row)
    tell(summary(rows))


def _run(
    settings: list[Setting], overrides: list[str], given: argparse.Namespace, folder: Path, until: float
) -> Iterator[dict[str, Any]]:
    """Runs settings side by side, and yields a row for each."""
    limit = min(LIMITS[settings[0].part], until - time.monotonic())
    end, first, running = time.monotonic() + limit, 0, []
    for setting in settings:
        told = json.dumps(attrs.asdict(setting))
        arguments = ["--setting", told, "--updates", str(given.updates), "--folder", str(folder / "saved"), *overrides]
        devices = None if given.device == "cpu" else range(first, first + setting.ranks)
        first += setting.ranks
        running.append(Ranks(__file__, setting.ranks, arguments, devices) if limit > 0 else None)
    try:
        for setting, ranks in zip(settings, running, strict=True):
            try:
                plan = planned(setting, overrides, given.gpu, given.nproc)
            except Exception as error:  # a measurement is worth more than its prediction
                plan = {"problem": repr(error)}
            row = attrs.asdict(setting) | {"planned": plan}
            found = {"problem": "no time was left"} if ranks is None else ranks.result(end - time.monotonic())
            yield row | found
    finally:
        for ranks in filter(None, running):
            ranks.stop()


if __name__ == "__main__":
    main()
