"""Passes that are replayed as CUDA graphs, against the same passes as they are."""

from __future__ import annotations

import copy

import pytest
import torch

from sftk.core.graph import Graph
from sftk.functional import KVCache
from sftk.functional.keys import Key
from sftk.models import WanConfig, WanModel
from sftk.models.held_linear import HalfLinear, hold_linears
from sftk.runtime.bench_cases import randomise_zeros
from sftk.runtime.cuda_graphs import MOST_GRAPHS, captured_graphs, release_room_memory, replay_passes
from sftk.runtime.parallelize import parallelize
from sftk.runtime.port import Port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Inductor and Triton warn about the machine they find
]

CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, in_dim=16, out_dim=16, freq_dim=64, text_dim=32, text_len=8)
BLOCKS = 4


def given(seed: int, batch: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "noise": torch.randn(batch, 3 * BLOCKS, 16, 8, 8, generator=generator).cuda(),
        "prompt_embeds": torch.randn(batch, 8, 32, generator=generator).cuda(),
        "key": Key(seed=seed, samples=tuple(range(batch))),
    }


def rolled(model, values, **options):
    graph = Graph.from_spec("specs/rollout.yaml", steps=[1000, 750, 500], **options)
    return graph(values, {"denoiser": Port(model, torch.bfloat16)})["x0"]


def pair(compiled: bool, kind: str = "none"):
    """A model, and its copy that replays."""
    torch.manual_seed(0)
    model = WanModel(CONFIG).cuda()
    randomise_zeros(model)
    plain, other = (hold_linears(m, HalfLinear) for m in (model, copy.deepcopy(model)))
    plain = parallelize(plain, checkpoint=kind, compile_blocks=compiled)
    return plain, replay_passes(parallelize(other, checkpoint=kind, compile_blocks=compiled))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_replayed_rollouts_are_the_rollouts(compiled, batch):
    plain, replaying = pair(compiled)
    before = captured_graphs()
    with torch.no_grad():
        for turn in range(4):
            values, steps = given(turn, batch), {"last_step_only": True}
            assert torch.equal(rolled(replaying, values, **steps), rolled(plain, values, **steps))
            # One for each length of the context, from its second pass on: later turns find their caches at the same addresses.
            assert captured_graphs() - before == BLOCKS
            for model in (plain, replaying):  # an update, in place
                for parameter in model.parameters():
                    parameter.mul_(1.0 + 0.1 * turn)


@pytest.mark.parametrize("kind", ["none", "selective", "products"])
def test_training_replays_what_has_no_gradient(kind):
    plain, replaying = pair(True, kind)
    before = captured_graphs()
    for turn in range(3):
        grads = []
        for model in (plain, replaying):
            rolled(model, given(turn), last_step_only=True).square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
        for ours, exact in zip(*grads, strict=True):
            assert (ours - exact).norm() <= 0.02 * exact.norm() + 1e-6  # sums of gradients have no fixed order
    assert captured_graphs() > before


def test_what_a_pass_returns_outlives_the_next_one():
    _, model = pair(False)
    values, port = given(0), Port(model, torch.bfloat16)
    timestep = torch.full((1, 3), 500.0, device="cuda")
    cache, text = KVCache(reserve=9), values["prompt_embeds"]
    with torch.no_grad():
        found, again = ([port(values["noise"][:, i : i + 3], timestep, text, cache=cache) for i in (0, 3, 6)] for _ in range(2))
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one[0], other[0])
        for a, b in zip(one[1], other[1], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_sampling_in_inference_mode_after_training():
    plain, replaying = pair(True)
    with torch.no_grad():
        for turn in range(2):
            rolled(replaying, given(turn))
    with torch.inference_mode():
        for turn in range(3):
            values = given(turn)
            assert torch.equal(rolled(replaying, values), rolled(plain, values))
    with torch.no_grad():
        values = given(9)
        assert torch.equal(rolled(replaying, values), rolled(plain, values))


def test_other_addresses_are_other_graphs():
    """A cache that is still held keeps its room: the next rollout has another one, and is right all the same."""
    plain, model = pair(False)
    graph = Graph.from_spec("specs/rollout.yaml", steps=[1000, 500], commit_last=True)
    held = []
    with torch.no_grad():
        for turn in range(4):
            values = given(turn)
            out = graph(values, {"denoiser": Port(model, torch.bfloat16)})
            held.append((out["cache"].layer(1)[0].clone(), out["cache"]))
            assert torch.equal(out["x0"], graph(values, {"denoiser": Port(plain, torch.bfloat16)})["x0"])
    for kept, cache in held:
        assert torch.equal(cache.layer(1)[0], kept)
    assert len(model.trunk._graphs) <= MOST_GRAPHS
    release_room_memory()


@pytest.mark.parametrize("first", ["within", "before"])
def test_an_autocast_of_the_caller_around_several_passes(first):
    """Casts of weights that it keeps are no part of a graph, from before the capture, and from the graph captured before.

    Graphs that read them would go on with the weights as they were, or with whatever lies there after the autocast.
    """
    torch.manual_seed(0)
    plain = WanModel(CONFIG).cuda()  # its linear layers hold no copies, so that autocast casts them
    randomise_zeros(plain)
    replaying = replay_passes(copy.deepcopy(plain))
    values, lengths, before = given(0), (3, 6), captured_graphs()

    def passed(model, frames, **more):
        timestep = torch.full((1, frames), 500.0, device="cuda")
        return Port(model, torch.bfloat16)(values["noise"][:, :frames], timestep, values["prompt_embeds"], **more)[0]

    def assert_alike(lengths):
        for frames in lengths:
            assert torch.equal(passed(replaying, frames, cache=KVCache()), passed(plain, frames, cache=KVCache()))

    with torch.no_grad():
        if first == "before":
            assert_alike(lengths)
        with torch.autocast("cuda", torch.bfloat16):
            for _ in range(2 if first == "within" else 1):
                assert_alike(lengths)
            assert torch.equal(passed(replaying, 12), passed(plain, 12))  # what is never replayed may find casts, too
        assert captured_graphs() - before == len(lengths)
        for model in (plain, replaying):
            for parameter in model.parameters():
                parameter.mul_(1.1)
        junk = [torch.full(p.shape, float("nan"), dtype=torch.bfloat16, device="cuda") for p in plain.parameters()]
        assert_alike(reversed(lengths))
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            assert_alike(reversed(lengths))
        assert captured_graphs() - before == len(lengths)
        del junk
