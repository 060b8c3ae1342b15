"""What of replayed passes needs no GPU; tests/gpu has the rest."""

from __future__ import annotations

import copy
import pickle

import pytest

from sftk.runtime.cuda_graphs import replay_passes


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_takes_no_graphs(make_model, copied):
    model = replay_passes(make_model())
    model.trunk._graphs["kind"] = lambda: None  # as a CUDA graph, it cannot be copied
    other = copied(model)
    assert not other.trunk._graphs
    assert all(a is b for a, b in zip(other.trunk._weights, other.blocks.parameters(), strict=True))
    assert len(model.trunk._graphs) == 1
