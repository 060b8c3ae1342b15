"""Graphs as modules of tensordict, for those who compose with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensordict import NonTensorData, is_tensor_collection
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

if TYPE_CHECKING:
    from sftk.core.graph import Graph


class _Call(nn.Module):
    """A graph as a module of its inputs, in order, whose models count once, however many nodes call them."""

    def __init__(self, graph: Graph, models: Mapping[str, Any]):
        super().__init__()
        self.graph, self.bound = graph, dict(models)
        self.models = nn.ModuleDict({role: model for role, model in models.items() if isinstance(model, nn.Module)})

    def forward(self, *args: Any) -> tuple[Any, ...]:
        keys = (*self.graph.inputs, *self.graph.optional)
        # tensordict hands over None for a key that its state lacks.
        values = {key: value for key, value in zip(keys, args, strict=True) if value is not None}
        self.graph.check_inputs(values)
        found = self.graph.run(values, self.bound)
        return tuple(_as_entry(found[key]) for key in self.graph.outputs)


def _as_entry(value: Any) -> Any:
    return value if isinstance(value, Tensor) or is_tensor_collection(value) else NonTensorData(value)


def as_tdmodule(graph: Graph, models: Mapping[str, Any]) -> TensorDictModule:
    """See `Graph.to_tdmodule`."""
    graph.check_models(models)
    in_keys: list[Any] = [*graph.inputs, *graph.optional]
    return TensorDictModule(_Call(graph, models), in_keys=in_keys, out_keys=list(graph.outputs))
