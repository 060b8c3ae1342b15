"""Finds where a run became NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sftk.core.graph import Graph
from sftk.runtime.shards import local


def find_nonfinite(graph: Graph, values: Mapping[str, Any], models: Mapping[str, Any]) -> str | None:
    """The first thing in a graph's run that is not finite, in words, or None.

    Looks at the inputs, the models' weights, then every key in the order in which it is written; random draws are keyed, so
    the run is the same as the one that failed.

    Example:
        >>> from sftk.functional import flow_target
        >>> graph = Graph([flow_target], inputs=("x0", "noise"))
        >>> find_nonfinite(graph, {"x0": torch.ones(1), "noise": torch.full((1,), torch.inf)}, {})
        "the input 'noise'"
    """
    found = [f"the input {key!r}" for key, value in values.items() if not _finite(value)]
    for role, port in models.items():
        for name, parameter in getattr(port, "module", port).named_parameters() if hasattr(port, "module") else ():
            if not _finite(local(parameter)):
                found.append(f"the weight {name!r} of {role!r}")
    with torch.no_grad():
        for node, key, value in graph.trace(values, models):  # to its end, as sharded models need every rank
            if not found and not _finite(value):
                found.append(f"{key!r}, written by {node.op.name!r}")
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value) if tensor.is_floating_point())
