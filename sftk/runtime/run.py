"""Runs a recipe: its stages in order, the evaluation, the report."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import attrs
import torch
from rich.console import Console

import sftk
from sftk.core.graph import Graph
from sftk.errors import CheckpointError
from sftk.runtime.build import weights_file
from sftk.runtime.checkpoint_restore import check_unchanged
from sftk.runtime.device import device_name
from sftk.runtime.evaluate import shipped_teacher
from sftk.runtime.evaluators import EVALUATORS, evaluation_enabled, evaluation_options, evaluation_problems
from sftk.runtime.figures import figures_table
from sftk.runtime.jobs import locked
from sftk.runtime.join import joined
from sftk.runtime.place import restarts
from sftk.runtime.prepare import prepare_data
from sftk.runtime.progress import TrainingProgress
from sftk.runtime.report import write_report
from sftk.runtime.rundir import RunDir, open_run, redirect_output
from sftk.runtime.sample_options import frame_rate
from sftk.runtime.stage import StageRun, saved_weights
from sftk.runtime.tracking import JsonlTracker, MultiTracker, TensorBoardTracker, Tracker, WandbTracker
from sftk.runtime.world import World
from sftk.spec.convert import unstructure
from sftk.spec.dump import dump_yaml
from sftk.spec.rank_checks import check_ranks
from sftk.spec.recipe import FROM_PYTHON, Stage, load_recipe
from sftk.spec.stores import check_stores


def run_recipe(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    console: Console | None = None,
    graphs: Mapping[str, Graph] | None = None,
) -> RunDir:
    """Trains, evaluates and reports what a recipe says; `sftk run` is this function.

    Under torchrun or srun it is called by every process, and each does its part; the first writes and reports, what the
    others print goes to `logs/rank_<rank>.log` in the run's folder.

    Args:
        recipe: a file, looked up in the working directory and then in the package, or a mapping that says what one would.
        overrides: `key.path=value`.
        run_dir: the run's folder; by default `runs/<recipe>/<time>`.
        resume: go on from the last checkpoint; without one, start afresh.
        allow_changes: resume though the recipe says otherwise than the one that the checkpoint was trained with.
        console: where progress is shown.
        graphs: phase name to a graph made in Python, for phases that name no spec.

    Returns:
        The run's folder.

    Raises:
        SpecError: the recipe is wrong, or a stage's data are of another size; nothing was written.
        CheckpointError: the recipe is another one than that of the run to resume; nothing was written.
        NonFiniteError: a loss became NaN or infinite.
        DistributedError: a process is missing.
        Interrupted: a signal stopped the run after a checkpoint.
    """
    stages = load_recipe(recipe, overrides, check=evaluation_problems, graphs=graphs)
    name = FROM_PYTHON if isinstance(recipe, Mapping) else Path(str(recipe)).stem
    first = stages[0].recipe
    with joined(first.device, first.parallel.timeout) as world, ExitStack() as held:
        for stage in stages:
            check_ranks(stage, world.size, world.node)
        world.told_by_first(lambda: check_stores(stages))
        resume = resume or max(world.gather(restarts())) > 0

        def open_folder() -> RunDir:
            found = open_run(name, run_dir, resume)
            held.enter_context(locked(found.root / "lock"))
            return found

        run = attrs.evolve(world.told_by_first(open_folder), writes=world.rank == 0)
        if world.rank:
            redirect_output(run.log(world.rank))
        if resume and not allow_changes:
            world.told_by_first(lambda: [check_unchanged(stage, run.checkpoints(stage.name)) for stage in stages])
        return _run_stages(stages, name, run, resume, world, console or Console())


def _run_stages(stages: Sequence[Stage], name: str, run: RunDir, resume: bool, world: World, console: Console) -> RunDir:
    run.write_text(run.recipe.name, _resolved(stages))
    earlier: dict[str, Path] = {}
    seconds = dict(world.told_by_first(lambda: run.read("seconds.json")) or {}) if resume else {}
    summary: dict[str, Any] = {}
    with TrainingProgress(console, enabled=run.writes) as progress:
        for stage in stages:
            with stage.plugins.again():
                summary = _run_stage(stage, run, earlier, seconds, resume, progress, world, last=stage is stages[-1])
            earlier |= world.told_by_first(functools.partial(saved_weights, stage, run.checkpoints(stage.name)))
    facts = {
        "recipe": name,
        "sftk": sftk.__version__,
        "torch": torch.__version__,
        "seed": stages[-1].recipe.seed,
        "ranks": world.size,
        "steps": {stage.name: stage.recipe.train.steps for stage in stages},
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }
    run.write("summary.json", facts | summary)
    if run.writes:
        report = write_report(run.root)
        if (table := figures_table(summary)) is not None:
            console.print(table)
        console.print(f"finished: {report}", soft_wrap=True)
    world.wait("report")
    return run


def _run_stage(
    stage: Stage,
    run: RunDir,
    earlier: dict[str, Path],
    seconds: dict[str, float],
    resume: bool,
    progress: TrainingProgress,
    world: World,
    *,
    last: bool,
) -> dict[str, Any]:
    """Trains one stage and, for the last one, evaluates it."""
    prepare_data(stage, progress)
    world.wait("data")
    training = StageRun(stage, run.checkpoints(stage.name), earlier, world, progress.note)
    _note_bad(training, progress)
    evaluation = _Evaluation(stage, training, run, progress) if last and evaluation_enabled(stage.recipe) else None
    if evaluation is not None and evaluation.due_before:
        with _timed(seconds, "evaluate before"):
            evaluation.before()
    done = training.resume() if resume else 0
    if done > stage.recipe.train.steps:
        raise CheckpointError(
            f"stage {stage.name!r} has made {done} steps, train.steps says {stage.recipe.train.steps}; "
            f"give at least {done} steps, or take another --run-dir"
        )
    if not training.done and run.writes:
        JsonlTracker.truncate(run.metrics, stage.name, done)
    progress.stage(stage.name, stage.recipe.train.steps, done)
    tracker = _tracker(stage, run, done)
    try:
        with _timed(seconds, f"train {stage.name}", add=True):
            training.train(tracker, progress)
        summary = {"device": device_name(training.built.device)}
        if evaluation is not None:
            with _timed(seconds, "evaluate"):
                summary |= evaluation.after(tracker)
    finally:
        run.write("seconds.json", seconds)
        tracker.close()
    return summary


@contextmanager
def _timed(seconds: dict[str, float], name: str, *, add: bool = False) -> Iterator[None]:
    """Notes how long the body took, even if it fails; with `add`, on top of what earlier attempts took."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = (seconds.get(name, 0.0) if add else 0.0) + time.monotonic() - began


def _note_bad(training: StageRun, progress: TrainingProgress) -> None:
    """Says what the data set left out."""
    bad = getattr(training.loader.dataset, "bad", ())
    for reason in bad:
        progress.note(f"left out: {reason}")
    if bad:
        progress.note(f"{len(bad)} left out of the data")


class _Evaluation:
    """Evaluates a stage before and after its training."""

    def __init__(self, stage: Stage, training: StageRun, run: RunDir, progress: TrainingProgress):
        self.stage, self.training, self.run, self.progress = stage, training, run, progress
        self.options = evaluation_options(stage.document, stage.recipe)
        assert stage.recipe.eval is not None
        make = EVALUATORS[stage.recipe.eval.use].make
        built = training.built
        self.evaluator = make(self.options, stage.recipe.latents.frames, built.device, built.mesh)

    @property
    def due_before(self) -> bool:
        """Whether the student is to be judged before training, and was not yet."""
        student = self.options.student if self.options.before else None
        starts = student is not None and self.stage.recipe.models[student].weights is not None
        return starts and self.training.world.told_by_first(lambda: self.run.read("student_before.json")) is None

    def before(self) -> None:
        """Judges the student as the stage finds it; a resumed run reads what this wrote."""
        self.progress.note("evaluating the student before training")
        assert self.options.student is not None
        port = self.training.built.ports[self.options.student]
        with torch.compiler.set_stance("force_eager"), self.training.built.averaged():
            self.run.write("student_before.json", self.evaluator.student_row(port))

    def after(self, tracker: Tracker) -> dict[str, Any]:
        """All rows of the summary, and the samples. Run eagerly: a graph for each length of context would not pay."""
        self.progress.note("evaluating")
        with torch.compiler.set_stance("force_eager"), self.training.built.averaged():
            return self._after(tracker)

    def _after(self, tracker: Tracker) -> dict[str, Any]:
        options, built = self.options, self.training.built
        rows: dict[str, Any] = {}
        shipped = None
        if options.teacher is not None:
            teacher = self.stage.recipe.models[options.teacher]
            fixed = options.teacher not in {role for phase in self.stage.recipe.phases for role in phase.roles}
            shipped = shipped_teacher(weights_file(teacher, self.stage, self.training.earlier), options) if fixed else None
        rows["real"] = self.evaluator.real_row()
        samples: dict[str, tuple[str, Any]] = {}
        if options.teacher is not None:
            port = built.ports[options.teacher]
            rows["teacher"] = shipped[0] if shipped else self.evaluator.teacher_row(port)
            samples["teacher"] = ("teacher", port)
        if options.student is not None:
            port = built.ports[options.student]
            before = self.run.read("student_before.json") if options.before and self.run.writes else None
            if before is not None:
                rows["student_before"] = before
            rows["student_after"] = self.evaluator.student_row(port, drift=True)
            samples["student"] = ("student", port)
        fps = frame_rate(self.stage.recipe)
        videos = self.evaluator.write_samples(self.run.samples, samples, fps)
        for caption, video in videos.items():
            tracker.video(self.training.step, f"samples/{caption}", video[0].numpy(), fps)
        drift = {name: row.pop("drift") for name, row in rows.items() if "drift" in row}
        facts: dict[str, Any] = {"evaluation": unstructure(options)}
        facts["evaluation"]["frames"] = facts["evaluation"].get("frames") or self.stage.recipe.latents.frames
        facts |= {"shipped": {"teacher": shipped[1]}} if shipped else {}
        return facts | rows | ({"drift": drift} if drift else {})


def _tracker(stage: Stage, run: RunDir, done: int) -> MultiTracker:
    if not run.writes:
        return MultiTracker([])
    trackers: list[Tracker] = [JsonlTracker(run.metrics, stage.name)]
    track = stage.recipe.track
    if track.tensorboard:
        trackers.append(TensorBoardTracker(run.tensorboard(stage.name), resumed_at=done))
    if track.wandb is not None:
        wandb = track.wandb
        config = unstructure(stage.recipe)
        trackers.append(
            WandbTracker(
                wandb.project,
                run.root,
                stage=stage.name,
                name=wandb.name,
                mode=wandb.mode,
                config=config,
                run_id=_wandb_id(run),
            )
        )
    return MultiTracker(trackers)


def _wandb_id(run: RunDir) -> str:
    """The id of the run in Weights & Biases: resumed runs and later stages go on in the same one."""
    found = run.read("wandb.json") or {"id": uuid4().hex}
    run.write("wandb.json", found)
    return found["id"]


def _resolved(stages: Sequence[Stage]) -> str:
    """The resolved recipe: that of the only stage, or of all of them under `stages`."""
    if len(stages) == 1:
        return stages[0].text
    return dump_yaml({"stages": {stage.name: stage.resolved for stage in stages}})
