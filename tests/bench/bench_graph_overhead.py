"""What a graph costs over the same calls written by hand, in microseconds for ten nodes.

    python tests/bench/bench_graph_overhead.py [--repeats 2000]

Prints one line of JSON: `us_per_10_nodes` is `Graph.run` on a plain dict, `us_per_10_nodes_dict` and
`us_per_10_nodes_tensordict` are `graph(state)` with either container at the boundary; each less the time of the bare calls.
"""

from __future__ import annotations

import argparse
import json
import timeit

import torch
from tensordict import TensorDict

from sftk.core import Graph, registry, transform

NODES = 10
BUDGET_US = 60.0


def add_one(x):
    """Almost nothing."""
    return x


def build() -> Graph:
    """Ten nodes in a row, each with a renamed input and output and one option's default."""
    made = transform(out="y", kind="per_sample")(add_one)
    registry.unregister(made.name)
    nodes = [made.node(in_={"x": f"k{i}"}, out={"y": f"k{i + 1}"}) for i in range(NODES)]
    return Graph(nodes, inputs=("k0",))


def by_hand(x):
    """The same calls without an engine."""
    for _ in range(NODES):
        x = add_one(x)
    return x


def microseconds(call, repeats: int) -> float:
    """The best of seven rounds."""
    return min(timeit.repeat(call, number=repeats, repeat=7)) / repeats * 1e6


def measure(repeats: int) -> dict[str, float]:
    """Overheads in microseconds."""
    graph, x = build(), torch.zeros(1)
    plain, boxed = {"k0": x}, TensorDict({"k0": x})
    base = microseconds(lambda: by_hand(x), repeats)
    return {
        "us_per_10_nodes": microseconds(lambda: graph.run(plain, {}), repeats) - base,
        "us_per_10_nodes_dict": microseconds(lambda: graph(plain), repeats) - base,
        "us_per_10_nodes_tensordict": microseconds(lambda: graph(boxed), repeats) - base,
        "us_by_hand": base,
        "budget_us": BUDGET_US,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    torch.set_num_threads(1)
    print(json.dumps({key: round(value, 3) for key, value in measure(parser.parse_args().repeats).items()}))


if __name__ == "__main__":
    main()
