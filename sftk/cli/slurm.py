"""`sftk slurm`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1))
@click.option("--gpus", default=8, show_default=True, type=click.IntRange(1), help="Of each node; one process for each.")
@click.option("--cpus", default=8, show_default=True, type=click.IntRange(1), help="Of each process.")
@click.option("--time", default="24:00:00", show_default=True, help="Limit of the job, after which it is queued again.")
@click.option("--notice", default=300, show_default=True, type=click.IntRange(1), help="Seconds before it to save and stop.")
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(0), help="After failures, within the job.")
@click.option("--launcher", default="srun", show_default=True, type=click.Choice(["srun", "torchrun"]))
@click.option("--partition", default="")
@click.option("--account", default="")
@click.option("--qos", default="")
@click.option("--setup", multiple=True, help="A shell line to run first, such as 'source venv/bin/activate'.")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="The run's folder, seen by all nodes [default: runs/<recipe>/slurm]."
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The script [default: <recipe>.sbatch].")
def slurm(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int,
    gpus: int,
    cpus: int,
    time: str,
    notice: int,
    restarts: int,
    launcher: str,
    partition: str,
    account: str,
    qos: str,
    setup: tuple[str, ...],
    run_dir: Path | None,
    out: Path | None,
) -> None:
    """Write a Slurm batch script that trains RECIPE, after checking the recipe for the ranks that the job has.

    The job saves a checkpoint before its time is over and is queued again; when a process dies it goes on from the last one.
    """
    from sftk.runtime.evaluators import evaluation_problems
    from sftk.runtime.rundir import write_text
    from sftk.runtime.slurm import SlurmJob, batch_script
    from sftk.spec.arrangement import arrange_ranks
    from sftk.spec.recipe import load_recipe

    for stage in load_recipe(recipe, overrides, check=evaluation_problems):
        arrange_ranks(stage.recipe, nodes * gpus, gpus)
    name = Path(recipe).stem
    run_dir, out = run_dir or Path("runs") / "_".join(name.split()) / "slurm", out or Path(f"{name}.sbatch")
    job = SlurmJob(
        name="_".join(name.split()),
        nodes=nodes,
        gpus=gpus,
        cpus=cpus,
        time=time,
        notice=notice,
        restarts=restarts,
        launcher=launcher,  # pyright: ignore[reportArgumentType]
        partition=partition,
        account=account,
        qos=qos,
        setup=setup,
    )
    write_text(out, batch_script(recipe, overrides, run_dir, job))
    click.echo(f"{out}: submit with `mkdir -p {run_dir} && sbatch {out}`")
