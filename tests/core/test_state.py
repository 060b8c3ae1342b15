from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from sftk.core import Graph, from_state, to_state, transforms
from sftk.core.state import KEYS

SPECS = sorted(Path(__file__).parents[2].glob("specs/*.yaml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_key_that_a_spec_takes_or_gives_is_explained(path):
    graph = Graph.from_spec(path)
    assert not {*graph.inputs, *graph.optional, *graph.outputs} - set(KEYS)


def test_no_key_is_explained_that_nothing_uses():
    used = {key for op in transforms().values() for key in (*op.inputs, *op.optional, *op.outputs)}
    for path in SPECS:
        graph = Graph.from_spec(path)
        used |= {*graph.inputs, *graph.optional, *graph.outputs}
    assert not set(KEYS) - used


def test_a_state_keeps_its_container_and_shares_its_tensors():
    values = {"x": torch.zeros(2, 3), "steps": (1000, 750), "inner": TensorDict({"y": torch.ones(4)})}
    state = to_state(values, like=TensorDict())
    assert isinstance(state, TensorDict)
    back = from_state(state)
    assert back["steps"] == (1000, 750)
    assert back["x"].data_ptr() == values["x"].data_ptr()
    assert torch.equal(back["inner"]["y"], torch.ones(4))
    assert from_state(values) == values
    assert from_state(values) is not values
