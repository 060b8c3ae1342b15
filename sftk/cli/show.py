"""`sftk show`."""

from __future__ import annotations

import click

from sftk.core.graph import Graph
from sftk.errors import SpecError, did_you_mean
from sftk.spec.graphs import load_graph
from sftk.spec.recipe import find_document, load_recipe


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--phase", help="Only this phase's graph.")
@click.option("--mermaid", is_flag=True, help="As Mermaid flowcharts instead of trees.")
def show(recipe: str, overrides: tuple[str, ...], phase: str | None, mermaid: bool) -> None:
    """Draw the graph of each phase of RECIPE, or of a spec."""
    graphs = _graphs(recipe, overrides)
    if phase is not None:
        graphs = {name: graph for name, graph in graphs.items() if name.rpartition(".")[2] == phase}
        if not graphs:
            names = [name.rpartition(".")[2] for name in _graphs(recipe, overrides)]
            raise SpecError(f"{recipe} has no phase {phase!r}; {did_you_mean(phase, names)}")
    for name, graph in graphs.items():
        if mermaid:
            click.echo(f"%% {name}\n{graph.to_mermaid()}\n")
        else:
            click.secho(name, bold=True)
            click.echo((f"{graph.doc}\n" if graph.doc else "") + graph.to_tree() + "\n")


def _graphs(recipe: str, overrides: tuple[str, ...]) -> dict[str, Graph]:
    value = find_document(recipe)[1].value
    if isinstance(value, dict) and "nodes" in value:
        return {recipe: load_graph(recipe)}
    stages = load_recipe(recipe, overrides)
    several = len(stages) > 1
    return {f"{s.name}.{n}" if several else n: graph for s in stages for n, graph in s.graphs.items()}
