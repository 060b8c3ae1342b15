"""Folds: a body of nodes that runs once for each item of a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sftk.core.check import free_keys
from sftk.core.closure import compile_step
from sftk.core.transform import Kind, Node, Transform


class Fold(Transform):
    """Runs a body once for each item of a host sequence, handing carried keys from one turn to the next.

    Args:
        body: the nodes of one turn. They see the enclosing graph's keys, the carried keys and the item.
        over: key of the sequence (a tuple), written by an earlier node or given as an input.
        item: key under which the body sees the current item.
        carry: keys that a turn hands to the next. A list reads their first values under the same names; a mapping
            `{body key: outer key}` says where each starts, and may so begin from a key that must not be bound again.
        collect: body key to outer key; the outer key holds the tuple of that key's value in each turn.

    Example:
        >>> from sftk.core import Graph, registry, transform
        >>> @transform(out="total", kind="host")
        ... def add_item(total, number):
        ...     '''A running sum.'''
        ...     return total + number
        >>> fold = Fold([add_item], over="numbers", item="number", carry=("total",), collect={"total": "history"})
        >>> Graph([fold], inputs=("numbers", "total"), rebind=("total",)).run({"numbers": (1, 2, 3), "total": 0}, {})
        {'total': 6, 'history': (1, 3, 6)}
        >>> registry.unregister("add_item")
    """

    kind: Kind = "reduced"

    def __init__(
        self,
        body: Iterable[Transform | Node],
        *,
        over: str,
        item: str,
        carry: Sequence[str] | Mapping[str, str],
        collect: Mapping[str, str] | None = None,
        name: str = "fold",
        doc: str = "",
    ):
        self.nodes = tuple(n if isinstance(n, Node) else n.node() for n in body)
        self.over, self.item = over, item
        self.carry = dict(carry) if isinstance(carry, Mapping) else {key: key for key in carry}
        self.collect = dict(collect or {})
        self.name, self.doc = name, doc
        required, optional = free_keys(self.nodes, bound=(item, *self.carry))
        self.inputs = tuple(dict.fromkeys((over, *self.carry.values(), *required)))
        self.optional = tuple(key for key in optional if key not in self.inputs)
        self.outputs = (*self.carry, *self.collect.values())
        self.ports = tuple(dict.fromkeys(role for node in self.nodes for _, role in node.roles))
        self._steps = tuple(compile_step(node) for node in self.nodes)

    def run(self, values: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
        result = {key: values[start] for key, start in self.carry.items()}
        collected: dict[str, list[Any]] = {key: [] for key in self.collect}
        for found in self.turns(values, models, (*self.carry, *self.collect)):
            result = {key: found[key] for key in self.carry}
            for key, values_so_far in collected.items():
                values_so_far.append(found[key])
        return result | {self.collect[key]: tuple(found) for key, found in collected.items()}

    def turns(self, values: Mapping[str, Any], models: Mapping[str, Any], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Runs turn by turn, when the next one is asked for.

        Args:
            keys: of the body, to yield after each turn; of a turn nothing else is kept but what it carries.

        Example:
            >>> from sftk.core import registry, transform
            >>> @transform(out="total", kind="host")
            ... def add_item(total, number):
            ...     '''A running sum.'''
            ...     return total + number
            >>> fold = Fold([add_item], over="numbers", item="number", carry=("total",))
            >>> next(fold.turns({"numbers": range(10**9), "total": 5}, {}, ["total"]))
            {'total': 5}
            >>> registry.unregister("add_item")
        """
        state = dict(values) | {key: values[start] for key, start in self.carry.items()}
        for item in state[self.over]:
            turn = state | {self.item: item}
            for step in self._steps:
                step(turn, models)
            state |= {key: turn[key] for key in self.carry}
            wanted = {key: turn[key] for key in keys}
            del turn  # before the consumer works: what a turn leaves behind may be large
            yield wanted

    def with_nodes(self, nodes: Iterable[Transform | Node]) -> Fold:
        """The same fold over another body."""
        return Fold(
            nodes,
            over=self.over,
            item=self.item,
            carry=self.carry,
            collect=self.collect,
            name=self.name,
            doc=self.doc,
        )

    def __repr__(self) -> str:
        return f"<fold over {self.over}: {len(self.nodes)} nodes, carry {', '.join(self.carry)}>"
