"""`sftk plan`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from sftk.runtime.plan_rates import GIB, GPUS, SHARDINGS

if TYPE_CHECKING:
    from sftk.runtime.plan_layout import Plan


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--gpu", "gpu_name", default="h100", show_default=True, type=click.Choice(sorted(GPUS)), help="Which.")
@click.option("--sharding", type=click.Choice(SHARDINGS), help="By default what suits the number of GPUs.")
@click.option("--node", default=8, show_default=True, type=click.IntRange(1), help="GPUs of a node.")
@click.option("--eight-bit", is_flag=True, help="Optimiser states of a byte each.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, in bytes and seconds.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    gpus: int,
    gpu_name: str,
    sharding: Any,
    node: int,
    eight_bit: bool,
    as_json: bool,
) -> None:
    """Estimate memory, time and communication of RECIPE on given GPUs, without weights and without a GPU."""
    import attrs

    from sftk.runtime.plan import plan_stage
    from sftk.spec.recipe import load_recipe

    plans = [
        plan_stage(stage, gpus=gpus, gpu_name=gpu_name, sharding=sharding, node=node, eight_bit=eight_bit)
        for stage in load_recipe(recipe, overrides)
    ]
    if as_json:
        click.echo(json.dumps([attrs.asdict(found) | {"fits": found.fits} for found in plans], indent=2))
        return
    for found in plans:
        click.echo("\n".join(_lines(found)))


COLUMNS = ("phase", "activations", "of it caches", "gradients", "peak", "TFLOP", "attention", "sent", "seconds")


def _lines(plan: Plan) -> Iterator[str]:
    passes = f"{plan.per_rank} sample{'s' * (plan.per_rank > 1)} in a pass, {plan.accumulation} in an update"
    yield f"{plan.stage}: {plan.gpus} x {plan.gpu}, {plan.sharding}; {passes}"
    yield "  parameters: " + ", ".join(f"{role} {count / 1e6:.1f} M" for role, count in plan.parameters.items())
    yield f"  held by each rank: weights {_gib(plan.weights)}, optimiser {_gib(plan.optimizer)}, average {_gib(plan.ema)}"
    table: list[tuple[str, ...]] = [COLUMNS]
    for phase in plan.phases:
        memory = (phase.activations, phase.caches, phase.gradients, phase.peak)
        rates = f"{phase.tflop:.0f}", f"{phase.attention:.0%}", _gib(phase.communication), f"{phase.seconds:.2f}"
        table.append((phase.name, *map(_gib, memory), *rates))
    for row in table:
        yield f"  {row[0]:16}" + "".join(f"{cell:>14}" for cell in row[1:])
    verdict = "fits" if plan.fits else "does not fit"
    yield f"  peak {_gib(plan.peak)} of {_gib(plan.budget)}: {verdict}; {plan.step_seconds:.2f} s a step"
    yield from (f"  {line}" for line in plan.advice)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
