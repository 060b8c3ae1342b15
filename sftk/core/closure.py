"""Nodes as closures that run on a graph's working dictionary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sftk.core.transform import FunctionTransform, Node

Step = Callable[[dict[str, Any], Mapping[str, Any]], None]


def compile_step(node: Node) -> Step:
    """A closure that runs one node on a graph's working dictionary, with every lookup that can be done once done.

    Args:
        node: what to run.

    Returns:
        `step(state, models)`, which reads the node's keys from `state` and writes its results there.

    Example:
        >>> from sftk.functional import flow_target
        >>> state = {"x0": 1.0, "noise": 3.0}
        >>> compile_step(flow_target.node())(state, {})
        >>> state["target"]
        2.0
    """
    op, options, results, roles = node.op, dict(node.options), node.results, node.roles
    reads, may_read = node.reads, node.may_read
    if isinstance(op, FunctionTransform):
        fn, single = op.fn, len(op.outputs) == 1

        def call(state: dict[str, Any], models: Mapping[str, Any]) -> None:
            arguments = {a: state[key] for a, key in reads}
            for a, key in may_read:
                if key in state:
                    arguments[a] = state[key]
            for port, role in roles:
                arguments[port] = models[role]
            result = fn(**arguments, **options)
            if single:
                for _, key in results:
                    state[key] = result
            else:
                named = op.pack(result)
                for name, key in results:
                    state[key] = named[name]
    else:

        def call(state: dict[str, Any], models: Mapping[str, Any]) -> None:
            named = op.run(*bind(node, state, models))
            for name, key in results:
                state[key] = named[name]

    if node.grad:
        return call

    def call_without_grad(state: dict[str, Any], models: Mapping[str, Any]) -> None:
        with torch.no_grad():
            call(state, models)

    return call_without_grad


def bind(node: Node, state: Mapping[str, Any], models: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A node's arguments and models, by the names that its transform gives them.

    Example:
        >>> from sftk.functional import flow_target
        >>> bind(flow_target.node(in_={"x0": "latents"}), {"latents": 1.0, "noise": 3.0, "more": 5.0}, {})
        ({'x0': 1.0, 'noise': 3.0}, {})
    """
    arguments = {a: state[key] for a, key in node.reads}
    arguments |= {a: state[key] for a, key in node.may_read if key in state}
    return arguments, {port: models[role] for port, role in node.roles}
