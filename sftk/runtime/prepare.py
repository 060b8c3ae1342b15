"""What must be made before a stage can read its data, by data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sftk.core.plugins import extensible
from sftk.errors import SpecError
from sftk.runtime.evaluators import evaluation_problems
from sftk.runtime.ode_pairs import make_pairs, pair_job
from sftk.runtime.progress import TrainingProgress
from sftk.spec.fetch import require_files
from sftk.spec.recipe import Stage, load_recipe
from sftk.spec.stores import check_stores


def prepare_ode_pairs(stage: Stage, progress: TrainingProgress) -> None:
    """Makes the ODE pairs that are missing, under a bar of their own."""
    job = pair_job(stage)
    if job is None:
        return
    path, count = job.plan.path, job.plan.count or 0
    present = sum(min(found, job.plan.in_shard(shard)) for shard, found in job.present().items())
    if present >= count:
        progress.note(f"{path}: all {count} ODE pairs are there")
        return
    times = ", ".join(f"{time:.4g}" for time in job.about["times"])
    progress.note(f"{path}: making ODE pairs {present + 1} to {count}, {job.plan.solver.steps} steps, kept at {times}")
    progress.stage("ODE pairs", count, present)
    made = make_pairs(job, lambda done: progress.update(min(done, count)))
    progress.note(f"{path}: {count} ODE pairs, {made} of them made now")


PREPARERS: dict[str, Callable[[Stage, TrainingProgress], None]] = {"ode_pairs": prepare_ode_pairs}
"""Data set to what the runner calls before a stage that reads it; a plugin may add its own."""
extensible(PREPARERS)


def prepare_data(stage: Stage, progress: TrainingProgress) -> None:
    """Makes what a stage's data set still lacks.

    Args:
        stage: about to start.
        progress: shows how far it is.

    Raises:
        DataError: files that the stage reads must be downloaded or made first.
    """
    require_files(stage)
    prepare = PREPARERS.get(stage.recipe.data.use)
    if prepare is not None:
        prepare(stage, progress)


def prepare_recipe(recipe: str | Path, overrides: Sequence[str] = (), progress: TrainingProgress | None = None) -> None:
    """Makes what the data sets of a recipe's stages lack, and trains nothing; `sftk data ode-pairs` is this function.

    Raises:
        SpecError: the recipe is wrong, or reads no data that could be made.
    """
    stages = load_recipe(recipe, overrides, check=evaluation_problems)
    asking = [stage for stage in stages if stage.recipe.data.use in PREPARERS]
    if not asking:
        found = ", ".join(sorted({stage.recipe.data.use for stage in stages}))
        raise SpecError(
            f"{recipe} reads the data set {found}, which needs nothing made; expected data: {{use: ode_pairs, ...}}"
        )
    check_stores(asking)
    for stage in asking:
        with stage.plugins.again():
            prepare_data(stage, progress or TrainingProgress(enabled=False))
