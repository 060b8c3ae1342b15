"""Trains one stage: steps, metrics, checkpoints, signals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

import sftk
from sftk.errors import NonFiniteError
from sftk.runtime.build import Built, WeightFinder, build_stage
from sftk.runtime.checkpoint import AVERAGE, checkpoint_files, last_checkpoint, read_facts
from sftk.runtime.checkpoint_restore import restore
from sftk.runtime.checkpoint_saver import Saver
from sftk.runtime.checkpoint_state import optimizer_parts, saved_models, weight_parts
from sftk.runtime.device import pick_device
from sftk.runtime.interrupt import Interrupted
from sftk.runtime.loader import Loader, make_loader
from sftk.runtime.mesh import make_mesh
from sftk.runtime.meter import Meter, first_nonfinite
from sftk.runtime.probe import find_nonfinite
from sftk.runtime.progress import TrainingProgress
from sftk.runtime.signals import agreed, catch_signals
from sftk.runtime.step import TrainingStep
from sftk.runtime.tracking import Tracker
from sftk.runtime.world import World
from sftk.spec.fingerprint import fingerprint, recipe_hash
from sftk.spec.recipe import Stage


@attrs.define(eq=False)
class StageRun:
    """One stage in training.

    Args:
        stage: what to train.
        folder: of its checkpoints.
        earlier: weights that stages before it left.
        world: the processes of the run.
        say: told what takes a while before the first step.
    """

    stage: Stage
    folder: Path
    earlier: WeightFinder
    world: World = attrs.field(factory=World)
    say: Callable[[str], None] = attrs.field(default=lambda line: None)
    built: Built = attrs.field(init=False)
    step: int = attrs.field(init=False, default=0)
    loader: Loader = attrs.field(init=False)
    _saver: Saver = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        recipe, device = self.stage.recipe, pick_device(self.stage.recipe.device)
        mesh = make_mesh(recipe, self.world, device)
        self.built = build_stage(self.stage, device, self.earlier, mesh, self.say)
        self.loader = make_loader(recipe, self.stage.path, rank=mesh.data_rank, world=mesh.data_world)
        self._saver = Saver(self.folder, recipe.checkpoint.keep, recipe.checkpoint.background)

    @property
    def done(self) -> bool:
        """Whether every step was made."""
        return self.step >= self.stage.recipe.train.steps

    def resume(self) -> int:
        """Goes on from the last checkpoint, if there is one; returns the steps done.

        Raises:
            CheckpointError: it is broken, or of other models.
        """
        found = self.world.told_by_first(lambda: last_checkpoint(self.folder))
        if found is None:
            return 0
        facts = self.world.told_by_first(lambda: read_facts(found))
        restore(found, self.built, self._roles)
        self.loader.load_state_dict(facts["loader"])
        self.step = facts["step"]
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
                stop = agreed(caught)
                if due or stop:
                    self._report(meter.flush(), run_step, tracker, progress)
                    saved = self.save(wait=stop is not None)
                    if stop is not None:
                        raise Interrupted(stop, self.step, saved)
        if recipe.train.steps == 0 and self.world.told_by_first(lambda: last_checkpoint(self.folder)) is None:
            self.save()
        self._saver.wait()

    def save(self, *, wait: bool = True) -> Path:
        """Writes a checkpoint of the current step, and returns its folder.

        Args:
            wait: until it is there; otherwise it is written while training goes on, if the recipe says so.
        """
        recipe = fingerprint(self.stage)
        facts = {
            "stage": self.stage.name,
            "sftk": sftk.__version__,
            "seed": self.stage.recipe.seed,
            "loader": self.loader.state_dict(),
            "recipe_hash": recipe_hash(recipe),
            "recipe": recipe,
        }
        parts = weight_parts(saved_models(self.built, self._roles), self.step) | optimizer_parts(self.built)
        saved = self._saver.save(self.step, parts, facts)
        if wait:
            self._saver.wait()
        return saved

    def save_finished(self) -> None:
        """Waits until the checkpoint that is being written is there.

        Raises:
            CheckpointError: it could not be written.
        """
        self._saver.wait()

    @property
    def _roles(self) -> tuple[str, ...]:
        """That are updated, and so saved."""
        return tuple(sorted({role for phase in self.stage.recipe.phases for role in phase.roles}))

    def _report(self, ready: list, run_step: TrainingStep, tracker: Tracker, progress: TrainingProgress) -> None:
        for step, values in ready:
            tracker.scalars(step + 1, values)
            progress.update(step + 1, values)
            name = first_nonfinite(values)
            if name is not None:
                raise NonFiniteError(self._explain(name, step, run_step))

    def _explain(self, name: str, step: int, run_step: TrainingStep) -> str:
        phase = name.partition("/")[0]
        turn, micro_batches = run_step.recent[step, phase]
        models = {port: self.built.ports[turn.phase.models.get(port, port)] for port in turn.graph.ports}
        # Every rank runs everything, however early it finds something: the others need it for sharded weights.
        mine = [find_nonfinite(turn.graph, values, models) for values in micro_batches]
        culprit = next(filter(None, (found for each in self.built.mesh.gather(mine) for found in each)), None)
        self._saver.wait()
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
    files = checkpoint_files(found)
    roles = sorted({role for phase in stage.recipe.phases for role in phase.roles})
    return {f"{stage.name}/{role}": files.get(f"{role}{AVERAGE}", files[role]) for role in roles}
