"""`sftk bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

DEFAULT_RECIPE = "benchmarks/dmd_1.3b.yaml"


class WithDefault(click.Group):
    """A group that runs its command `recipe` where no command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the default command's name in front where no other is."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["recipe", *args]
        return super().parse_args(ctx, args)


class Words(click.ParamType):
    """A list with commas, of words or of numbers."""

    name = "a,b,..."

    def __init__(self, kind: type[str] | type[int] = str):
        self.kind = kind

    def convert(self, value, param, ctx):
        """The parts as a tuple."""
        try:
            return tuple(self.kind(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            return self.fail(f"expected numbers with commas between, found {value!r}", param, ctx)


@click.group(cls=WithDefault)
def bench() -> None:
    """Measure time and memory on this machine: `sftk bench [RECIPE]`, or `sftk bench attention`."""


@bench.command()
@click.argument("arguments", nargs=-1, metavar="[RECIPE] [KEY.PATH=VALUE]...")
@click.option("--only", type=Words(), default="", help="Cases, in order: phases, rollout, forward, forward_backward, steps.")
@click.option("--exit-step", "exit_steps", type=Words(int), default="", help="Places in the step list [default: all].")
@click.option("--steps", "repeats", default=3, show_default=True, type=click.IntRange(1), help="Measured repeats, at most.")
@click.option("--warmup", default=1, show_default=True, type=click.IntRange(0), help="Repeats before them.")
@click.option("--seconds", default=6.0, show_default=True, help="After so many, a row gets no further repeat.")
@click.option("--variants", type=click.Path(path_type=Path), help="YAML list of {name, with: {key.path: value}}.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report here, row by row.")
@click.option("--against", type=click.Path(path_type=Path), help="Compare with an earlier report.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write traces here, and show time by kind of kernel.")
def recipe(
    arguments: tuple[str, ...],
    only: tuple[str, ...],
    exit_steps: tuple[int, ...],
    repeats: int,
    warmup: int,
    seconds: float,
    variants: Path | None,
    json_file: Path | None,
    against: Path | None,
    profile: Path | None,
) -> None:
    """Measure RECIPE's phases at each exit step, its rollout and passes of its student. The exit code is 1 when a row failed.

    Without RECIPE it is a DMD step at the size of Wan 2.1 1.3B with random weights.
    """
    from sftk.runtime.bench import BenchOptions, run_bench, write_json
    from sftk.runtime.bench_report import read_report, report_lines
    from sftk.spec.variants import load_variants

    chosen, overrides = _recipe(arguments)
    before = None if against is None else read_report(against)
    options = BenchOptions(
        only=only, exit_steps=exit_steps, repeats=repeats, warmup=warmup, most_seconds=seconds, profile=profile
    )
    report = run_bench(
        load_variants(chosen, overrides, variants),
        options,
        say=lambda line: click.echo(line, err=True),
        save=lambda found: write_json(found, json_file) if json_file is not None else None,
    )
    click.echo("\n".join(report_lines(report, before)))
    if any("error" in found for variant in report["variants"] for found in (variant, *variant["rows"])):
        sys.exit(1)


@bench.command()
@click.argument("arguments", nargs=-1, metavar="[RECIPE] [KEY.PATH=VALUE]...")
@click.option("--only", type=Words(), default="", help="Shapes: full, cached, block_causal, cross.")
@click.option("--steps", "repeats", default=5, show_default=True, type=click.IntRange(1), help="Measured repeats.")
@click.option(
    "--frames-per-block", default=3, show_default=True, type=click.IntRange(1), help="Of cached and block-causal passes."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report here.")
@click.option("--save", is_flag=True, help="Let `backend: auto` take the fastest on this device from now on.")
def attention(
    arguments: tuple[str, ...], only: tuple[str, ...], repeats: int, frames_per_block: int, json_file: Path | None, save: bool
) -> None:
    """Measure attention at the shapes of RECIPE's student: each backend's TFLOP/s, and its error against float32."""
    from sftk.runtime.attention_choice import choose, save_choice
    from sftk.runtime.attention_shapes import model_shapes
    from sftk.runtime.bench import write_json
    from sftk.runtime.bench_attention import attention_lines, bench_attention
    from sftk.runtime.device import pick_device, set_precision
    from sftk.runtime.sample_options import sampled_role
    from sftk.spec.recipe import load_recipe

    chosen, overrides = _recipe(arguments)
    stage = load_recipe(chosen, overrides)[-1]
    device = pick_device(stage.recipe.device)
    recipe = stage.recipe
    config = recipe.models[sampled_role(stage.document, recipe)].config
    heads, shapes = model_shapes(
        config,
        recipe.latents,
        batch=recipe.batch.split()[0],
        precision=recipe.precision,
        frames_per_block=frames_per_block,
    )
    kinds = list(dict.fromkeys(shape.name.split()[0] for shape in shapes))
    for name in only:
        if name not in kinds:
            raise click.BadParameter(f"there is no shape {name!r}, only {', '.join(kinds)}", param_hint="--only")
    wanted = [shape for shape in shapes if not only or shape.name.split()[0] in only]
    set_precision("fp32")  # the reference is exact
    report = bench_attention(heads, wanted, device, repeats=repeats, say=lambda line: click.echo(line, err=True))
    if json_file is not None:
        write_json(report, json_file)
    click.echo("\n".join(attention_lines(report)))
    if save:
        click.echo(f"kept for `backend: auto`: {save_choice(choose(report))}")


def _recipe(arguments: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The recipe that is named, or the benchmark's, and the overrides."""
    named = arguments and "=" not in arguments[0]
    return (arguments[0], arguments[1:]) if named else (DEFAULT_RECIPE, arguments)
