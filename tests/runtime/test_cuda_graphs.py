"""What of replayed passes needs no GPU; tests/gpu has the rest."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sftk.functional.exchange import OneRank
from sftk.models.block_ops import PLAIN
from sftk.models.trunk import BlockCall
from sftk.runtime.cuda_graphs import GraphedTrunk, replay_passes

TABLE = torch.zeros(1)


def call_of(chunk):
    """A pass behind one layer's chunk."""
    return BlockCall(
        time=TABLE, rope=(TABLE, TABLE), past_rope=None, text=None, text_kv=None, past=(chunk,), joint=True, mask=None,
        backend="sdpa", text_backend="sdpa", keep_kv=False, exchange=OneRank(), ops=PLAIN,
    )  # fmt: skip


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_takes_no_graphs(make_model, copied):
    model = replay_passes(make_model())
    model.trunk._graphs["kind"] = lambda: None  # as a CUDA graph, it cannot be copied
    other = copied(model)
    assert not other.trunk._graphs
    assert all(a is b for a, b in zip(other.trunk._weights, other.blocks.parameters(), strict=True))
    assert len(model.trunk._graphs) == 1


@pytest.mark.parametrize(("batch", "same"), [(1, True), (2, False)])
def test_a_graph_knows_how_far_apart_the_samples_of_a_room_lie(make_model, batch, same):
    """Rooms of 9 and of 6 frames at one address, as memory of a pool comes back; passes see the first 4 frames of each."""
    trunk, x, memory = GraphedTrunk(make_model()), torch.zeros(batch, 1, 24), torch.zeros(2 * 9 * 12)

    def key(frames):
        room = memory[: batch * frames * 12].view(batch, frames, 2, 6)[:, :4]
        return trunk._key(x, call_of(((room, room),)))

    assert (key(9) == key(6)) == same
