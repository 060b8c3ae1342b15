"""What of replayed passes needs no GPU; tests/gpu has the rest."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sftk.functional import KVCache
from sftk.functional.exchange import OneRank
from sftk.models.block_ops import PLAIN
from sftk.models.trunk import BlockCall, run_blocks
from sftk.runtime import cuda_graphs
from sftk.runtime.cuda_graphs import GraphedTrunk, replay_passes

TABLE = torch.zeros(1)


def call_of(chunk):
    """A pass behind one layer's chunk."""
    return BlockCall(
        time=TABLE, rope=(TABLE, TABLE), past_rope=None, text=None, text_kv=None, past=(chunk,), joint=True, mask=None,
        backend="sdpa", text_backend="sdpa", keep_kv=False, apart=False, exchange=OneRank(), ops=PLAIN,
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


class Casts(TorchDispatchMode):
    """Counts the casts of some weights."""

    def __init__(self, weights):
        super().__init__()
        self.addresses, self.count = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.addresses
        return func(*args, **(kwargs or {}))


@pytest.fixture
def captures(monkeypatch):
    """What is captured runs."""
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: nullcontext())
    monkeypatch.setattr(cuda_graphs, "_captured", 0)  # is as it was afterwards
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_all_graphs_leave_hidden_states_in_one_place(make_model, captures):
    """Else a rollout's memory would grow with the number of its graphs. Two passes give what they give without graphs."""
    model, outs, recorded = make_model(torch.float32), [], []

    def passed(blocks, x, call, wanted=()):
        plain = run_blocks(blocks, x, call)
        outs.append(plain[0])
        recorded.append(trunk._record(blocks, x, call))
        assert torch.equal(recorded[-1].x, plain[0])
        return plain

    trunk, model.trunk = GraphedTrunk(model), passed
    with torch.no_grad():
        for seed in range(2):
            latents = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
            model(latents, torch.zeros(1, 3), torch.zeros(1, 4, 8), cache=KVCache())
    assert not torch.equal(*outs)
    assert recorded[0].x.data_ptr() == recorded[1].x.data_ptr()


def test_a_graph_casts_weights_itself_in_a_caller_s_autocast(make_model, captures):
    """Neither what autocast keeps from before is in it, nor does it leave casts in its own memory for later passes."""
    model = make_model(torch.float32)
    trunk = GraphedTrunk(model)
    linears = [module for module in model.blocks.modules() if isinstance(module, torch.nn.Linear)]
    weights = [weight for module in linears for weight in module.parameters()]

    def recorded(blocks, x, call, wanted=()):
        found = trunk._record(blocks, x, call)
        return found.x, found.kv, {}

    def casts(through):
        model.trunk = through
        with Casts(weights) as found:
            model(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 3), torch.zeros(1, 4, 8), cache=KVCache())
        return found.count

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = casts(run_blocks)
        assert first == len(weights) > 0
        assert casts(run_blocks) == 0  # autocast keeps them
        assert casts(recorded) == first
        assert casts(run_blocks) == first
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            assert casts(recorded) == first
