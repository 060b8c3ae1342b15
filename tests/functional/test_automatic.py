"""What `auto` takes at which shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftk.functional.attention import automatic, set_auto


@pytest.fixture(autouse=True, scope="module")
def plain():
    yield
    set_auto()


@given(
    measured=st.lists(st.tuples(st.integers(1, 40000), st.integers(1, 40000)), min_size=1, max_size=6, unique=True),
    asked=st.tuples(st.integers(1, 40000), st.integers(1, 40000)),
)
def test_the_nearest_measured_shape_counts(measured, asked):
    """By the sum of what the logarithms of queries and keys differ; at a measured shape, that one."""
    table = {shape: f"backend {index}" for index, shape in enumerate(measured)}
    far = {backend: sum(abs(math.log(a / b)) for a, b in zip(asked, shape, strict=True)) for shape, backend in table.items()}
    set_auto(forward=table)
    assert far[automatic("forward", *asked)] <= min(far.values()) + 1e-9
    assert {shape: automatic("forward", *shape) for shape in table} == table


@pytest.mark.parametrize(("table", "count"), [({(1, 1): "sdpa"}, 1), ({(20, 20): "sdpa", (20, 400): "flash_split_kv"}, 2)])
def test_a_compiled_call_asks_once_for_each_answer(table, count):
    """Not once for each number of keys: a layout is computed by calls inside of compiled blocks."""
    set_auto(forward=table)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=counting, fullgraph=True, dynamic=False)
    def ask(q, k):
        return q + 1, automatic("forward", q.shape[1], k.shape[1])

    for keys in (20, 30, 40, 300, 350, 400):
        k = torch.zeros(1, keys)
        torch._dynamo.maybe_mark_dynamic(k, 1)
        assert ask(torch.zeros(1, 10), k)[1] == table[max(table) if keys > 100 else min(table)]
    assert len(graphs) == count
