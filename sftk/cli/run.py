"""`sftk run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sftk.runtime.launch import Launch


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="The run's folder [default: runs/<recipe>/<time>; of a study runs/<study>].",
)
@click.option(
    "--resume", is_flag=True, help="Go on from the last checkpoint; without one, start afresh. A study goes on without it, too."
)
@click.option(
    "--allow-changes",
    is_flag=True,
    help="Resume though the recipe is not the one that the checkpoint was trained with.",
)
@click.option("--jobs", "-j", type=click.IntRange(1), help="Of a study: most runs at a time [default: 1].")
@click.option("--nproc", metavar="N|auto", help="Processes on this node; auto is one for each GPU [default: this one].")
@click.option("--nnodes", default=1, show_default=True, type=click.IntRange(1), help="Nodes, on each of which this is started.")
@click.option("--node-rank", type=click.IntRange(0), help="Of this node; node 0 hosts the meeting place.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the nodes meet.")
@click.option(
    "--max-restarts",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="How often to go on from the last checkpoint when a process dies.",
)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: bool,
    allow_changes: bool,
    jobs: int | None,
    nproc: str | None,
    nnodes: int,
    node_rank: int | None,
    rdzv_endpoint: str | None,
    max_restarts: int,
) -> None:
    """Train what RECIPE says, evaluate it and write a report.

    RECIPE is looked up in the working directory, then in the package: `sftk run recipes/dmd.yaml train.steps=100`.
    It may also be a study, a file with a `matrix` of recipes, which are then run side by side.

    With --nproc this starts that many processes; under torchrun or srun, each process is started with this command as it is.
    """
    from sftk.runtime.launch import Launch, processes
    from sftk.runtime.run import run_recipe
    from sftk.runtime.study import run_study
    from sftk.spec.recipe import find_document, is_study

    study = is_study(find_document(recipe)[1])
    if jobs is not None and not study:
        raise click.UsageError("--jobs is for studies; this recipe is one run")
    if nproc is None:
        if nnodes > 1 or node_rank is not None or rdzv_endpoint is not None or max_restarts:
            raise click.UsageError("--nnodes, --node-rank, --rdzv-endpoint and --max-restarts need --nproc")
        if study:
            run_study(recipe, overrides, run_dir=run_dir, jobs=jobs or 1)
        else:
            run_recipe(recipe, overrides, run_dir=run_dir, resume=resume, allow_changes=allow_changes)
        return
    if study:
        raise click.UsageError("--nproc is for one run; a study runs each of its rows in one process")
    options = Launch(
        nproc=processes(nproc), nnodes=nnodes, node_rank=node_rank, endpoint=rdzv_endpoint, max_restarts=max_restarts
    )
    if nnodes > 1 and run_dir is None:
        raise click.UsageError("several nodes write to one folder that all of them see; name it with --run-dir")
    flags = [flag for flag, given in (("--resume", resume), ("--allow-changes", allow_changes)) if given]
    sys.exit(_launch(recipe, overrides, run_dir, flags, options))


def _launch(recipe: str, overrides: tuple[str, ...], run_dir: Path | None, flags: list[str], options: Launch) -> int:
    """Checks the recipe once, for these ranks, and starts the processes."""
    import attrs

    from sftk.runtime.evaluators import evaluation_problems
    from sftk.runtime.launch import launch
    from sftk.runtime.rundir import RunDir, open_run
    from sftk.spec.rank_checks import check_ranks
    from sftk.spec.recipe import load_recipe
    from sftk.spec.stores import check_stores

    stages = load_recipe(recipe, overrides, check=evaluation_problems)
    for stage in stages:
        check_ranks(stage, options.ranks, options.nproc)
    check_stores(stages)
    if options.nnodes == 1:
        run = open_run(Path(recipe).stem, run_dir, "--resume" in flags)
    else:
        assert run_dir is not None
        run = RunDir(run_dir)
    arguments = ["run", recipe, *overrides, "--run-dir", str(run.root), *flags]
    return launch(arguments, options, attrs.evolve(run, writes=False))
