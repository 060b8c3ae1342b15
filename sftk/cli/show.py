"""`sftk show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sftk.errors import Problem, SpecError, did_you_mean

if TYPE_CHECKING:
    from sftk.core.graph import Graph


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--phase", help="Only this phase's graph.")
@click.option("--mermaid", is_flag=True, help="As Mermaid flowcharts instead of trees.")
def show(recipe: str, overrides: tuple[str, ...], phase: str | None, mermaid: bool) -> None:
    """Draw the graph of each phase of RECIPE, or of a spec, whose parameters are then PARAMETER=VALUE."""
    graphs = _graphs(recipe, overrides)
    chosen = {name: graph for name, graph in graphs.items() if phase in (None, name, name.rpartition(".")[2])}
    if phase is not None and not chosen:
        hint = did_you_mean(phase, (name.rpartition(".")[2] for name in graphs))
        raise SpecError([Problem(message=f"{recipe} has no phase {phase!r}", hint=hint)])
    for name, graph in chosen.items():
        if mermaid:
            click.echo(f"%% {name}\n{graph.to_mermaid()}\n")
        else:
            click.secho(name, bold=True)
            click.echo((f"{graph.doc}\n" if graph.doc else "") + graph.to_tree() + "\n")


def _graphs(recipe: str, overrides: tuple[str, ...]) -> dict[str, Graph]:
    from sftk.spec.document import Document
    from sftk.spec.graphs import load_graph
    from sftk.spec.overrides import apply_overrides
    from sftk.spec.recipe import find_document, load_recipe

    value = find_document(recipe)[1].value
    if isinstance(value, dict) and "nodes" in value:
        params = apply_overrides(Document(value={}, file=recipe), overrides).value
        return {recipe: load_graph(recipe, params)}
    stages = load_recipe(recipe, overrides)
    several = len(stages) > 1
    return {f"{s.name}.{n}" if several else n: graph for s in stages for n, graph in s.graphs.items()}
