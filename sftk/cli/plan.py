"""`sftk plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from sftk.runtime.plan_rates import GPUS, NODE

if TYPE_CHECKING:
    from sftk.runtime.plan_layout import Plan


class Counts(click.ParamType):
    """Numbers from 1 upwards, with commas between them."""

    name = "N[,N]..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(one) for one in str(value).split(","))
        except ValueError:
            found = ()
        if not found or min(found) < 1:
            self.fail(f"{value!r} is no number of GPUs from 1 upwards, or several such as 8,64,512", param, ctx)
        return found


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--gpus", "counts", default="1", show_default=True, type=Counts(), help="How many; several side by side.")
@click.option("--gpu", "gpu_name", default="h100", show_default=True, type=click.Choice(sorted(GPUS)), help="Which.")
@click.option(
    "--gpus-per-node", "--node", "node", default=NODE, show_default=True, type=click.IntRange(1), help="GPUs of a node."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, in bytes and seconds.")
def plan(recipe: str, overrides: tuple[str, ...], counts: tuple[int, ...], gpu_name: str, node: int, as_json: bool) -> None:
    """Estimate memory, time and communication of RECIPE on given GPUs, without weights and without a GPU.

    How ranks share weights and samples is what the recipe's `parallel` and `batch` say; try others as KEY.PATH=VALUE.
    """
    from sftk.errors import SpecError
    from sftk.runtime.plan import plan_counts, plan_stage
    from sftk.runtime.plan_layout import Plan
    from sftk.runtime.plan_report import compare_counts, describe_plan
    from sftk.spec.recipe import load_recipe

    stages = load_recipe(recipe, overrides)
    if len(counts) == 1:
        plans = [plan_stage(stage, gpus=counts[0], gpu_name=gpu_name, node=node) for stage in stages]
        shown = [_values(found) for found in plans]
        lines = [line for found in plans for line in describe_plan(found)]
    else:
        tables = [plan_counts(stage, counts, gpu_name=gpu_name, node=node) for stage in stages]
        for table in tables:
            problems = [found for found in table.values() if isinstance(found, SpecError)]
            if len(problems) == len(table):
                raise problems[0]
        shown = [
            _values(found) if isinstance(found, Plan) else {"stage": stage.name, "gpus": gpus, "problem": str(found)}
            for stage, table in zip(stages, tables, strict=True)
            for gpus, found in table.items()
        ]
        lines = [line for table in tables for line in compare_counts(table)]
    click.echo(json.dumps(shown, indent=2) if as_json else "\n".join(lines))


def _values(found: Plan) -> dict[str, Any]:
    import attrs

    return attrs.asdict(found) | {"fits": found.fits}
