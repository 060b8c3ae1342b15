"""Trains one stage: steps, metrics, checkpoints, signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from sftk.errors import NonFiniteError
from sftk.runtime.build import Built, WeightFinder, build_stage
from sftk.runtime.checkpoint import checkpoint_step, last_checkpoint, load_checkpoint, save_checkpoint
from sftk.runtime.device import pick_device
from sftk.runtime.loader import make_loader
from sftk.runtime.mesh import make_mesh
from sftk.runtime.meter import Meter, first_nonfinite
from sftk.runtime.probe import find_nonfinite
from sftk.runtime.progress import TrainingProgress
from sftk.runtime.step import TrainingStep
from sftk.runtime.tracking import Tracker
from sftk.runtime.world import World
from sftk.spec.recipe import Stage


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint was saved first."""

    def __init__(self, name: str, step: int, checkpoint: Path):
        self.signal, self.step, self.checkpoint = name, step, checkpoint
        super().__init__(f"stopped by {name} after step {step}; saved {checkpoint}")


@attrs.define(eq=False)
class StageRun:
    """One stage in training.

    Args:
        stage: what to train.
        folder: of its checkpoints.
        earlier: weights that stages before it left.
        world: the processes of the run.
    """

    stage: Stage
    folder: Path
    earlier: WeightFinder
    world: World = attrs.field(factory=World)
    built: Built = attrs.field(init=False)
    step: int = attrs.field(init=False, default=0)
    loader: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        recipe, device = self.stage.recipe, pick_device(self.stage.recipe.device)
        mesh = make_mesh(recipe, self.world, device)
        self.built = build_stage(self.stage, device, self.earlier, mesh)
        self.loader = make_loader(recipe, self.stage.path, rank=mesh.data_rank, world=mesh.data_world)

    @property
    def done(self) -> bool:
        """Whether every step was made."""
        return self.step >= self.stage.recipe.train.steps

    def resume(self) -> int:
        """Goes on from the last checkpoint, if there is one; returns the steps done."""
        found = last_checkpoint(self.folder)
        if found is None:
            return 0
        for role, ema in self.built.emas.items():
            if (found / f"{role}.ema.safetensors").is_file():
                ema.begin()
        training = load_checkpoint(found, self._saved_modules())
        for role, state in training["optimizers"].items():
            self.built.optimizers[role].load_state_dict(state)
        self.loader.load_state_dict(training["loader"])
        self.step = checkpoint_step(found)
        return self.step

    def train(self, tracker: Tracker, progress: TrainingProgress) -> None:
        """Makes the steps that are left.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
            Interrupted: a signal arrived; a checkpoint was saved.
        """
        recipe, meter = self.stage.recipe, Meter(self.built.device)
        run_step = TrainingStep(recipe, self.built, iter(self.loader))
        with catch_signals() as caught:
            while not self.done:
                metrics = run_step(self.step)
                self._report(meter.put(self.step, metrics), run_step, tracker, progress)
                self.step += 1
                due = self.done or self.step % recipe.checkpoint.every == 0
                if due or caught:
                    self._report(meter.flush(), run_step, tracker, progress)
                    saved = self.save()
                    if caught:
                        raise Interrupted(caught[0], self.step, saved)
        if recipe.train.steps == 0 and last_checkpoint(self.folder) is None:
            self.save()

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        training = {
            "step": self.step,
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.built.optimizers.items()},
            "loader": self.loader.state_dict(),
        }
        return save_checkpoint(self.folder, self.step, self._saved_modules(), training, self.stage.recipe.checkpoint.keep)

    def _saved_modules(self) -> dict[str, Any]:
        updated = {role for phase in self.stage.recipe.phases for role in phase.roles}
        modules = {role: self.built.modules[role] for role in sorted(updated)}
        return modules | {f"{role}.ema": ema for role, ema in self.built.emas.items() if ema.begun}

    def _report(self, ready: list, run_step: TrainingStep, tracker: Tracker, progress: TrainingProgress) -> None:
        for step, values in ready:
            tracker.scalars(step + 1, values)
            progress.update(step + 1, values)
            name = first_nonfinite(values)
            if name is not None:
                raise NonFiniteError(self._explain(name, step, run_step))

    def _explain(self, name: str, step: int, run_step: TrainingStep) -> str:
        phase = name.partition("/")[0]
        section = next(p for p in self.stage.recipe.phases if p.name == phase)
        graph = self.stage.graphs[phase]
        models = {port: self.built.ports[section.models.get(port, port)] for port in graph.ports}
        # Every rank runs everything, however early it finds something: the others need it for sharded weights.
        mine = [find_nonfinite(graph, values, models) for values in run_step.recent[step, phase]]
        culprit = next(filter(None, (found for each in self.built.mesh.gather(mine) for found in each)), None)
        saved = last_checkpoint(self.folder)
        good = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved before"
        where = (
            f"first seen in {culprit}"
            if culprit
            else "every key is finite when the step is run again: only its gradient overflowed"
        )
        return f"{name} is not finite at step {step + 1} of stage {self.stage.name!r}, phase {phase!r}; {where}; {good}"


def saved_weights(stage: Stage, folder: Path) -> dict[str, Path]:
    """`<stage>/<role>` to the weight file in the stage's last checkpoint, averages first."""
    found = last_checkpoint(folder)
    if found is None:
        return {}
    files = {}
    for role in sorted({role for phase in stage.recipe.phases for role in phase.roles}):
        average = found / f"{role}.ema.safetensors"
        files[f"{stage.name}/{role}"] = average if average.is_file() else found / f"{role}.safetensors"
    return files


@contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM in a list instead of dying; the second SIGINT interrupts at once."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
