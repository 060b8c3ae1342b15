"""Blocks of a pass with gradient that join no copies of what is cached: when they do so, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from sftk.core.graph import Graph
from sftk.core.numerics import as_with_gradient
from sftk.core.replay import replayed
from sftk.functional import apart
from sftk.functional.attention import exact_derivatives
from sftk.functional.cache import KVCache, append
from sftk.functional.keys import Key
from sftk.functional.packed import pack
from sftk.models import pass_kind, past
from sftk.models.past import APART_FROM, attends_apart
from sftk.runtime.parallelize import parallelize

FRAME = 4
"""Tokens."""


@pytest.fixture
def count(monkeypatch):
    """Passes with more than a frame in the cache attend apart, in small pieces; one entry for each that did."""
    passes = []

    def decide(*given):
        found = attends_apart(*given)
        passes.extend([given] * found)
        return found

    monkeypatch.setattr(past, "APART_FROM", FRAME)
    monkeypatch.setattr(apart, "PIECE", 7)
    monkeypatch.setattr(pass_kind, "attends_apart", decide)
    return passes


def given(blocks=4):
    generator = torch.Generator().manual_seed(0)
    return {
        "noise": torch.randn(2, 3 * blocks, 4, 4, 4, generator=generator, dtype=torch.float64),
        "prompt_embeds": torch.randn(2, 4, 8, generator=generator, dtype=torch.float64),
        "key": Key(seed=0, samples=(0, 1)),
    }


def rolled(model, replay=False, **options):
    graph, tape = Graph.from_spec("specs/rollout.yaml", steps=[1000, 500], **options), None
    if replay:
        graph, tape = replayed(graph)
    x0 = graph(given(), {"denoiser": model})["x0"]
    x0.square().sum().backward()
    if tape is not None:
        tape.pull_back()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return x0.detach(), *gradients


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 3),  # of four blocks, the first one has no context
        ({"window": 6, "sink": 3}, 3),
        ({"context_gradient": "straight_through"}, 0),
        ({"rope": "relative"}, 0),
        ({"kv_cache": "int8"}, 0),
    ],
)
def test_a_rollout_has_the_same_gradients(make_model, count, monkeypatch, options, times, replay):
    model = make_model()
    found = rolled(model, replay, **options)
    assert len(count) == times * (2 if replay else 1)
    monkeypatch.setattr(past, "APART_FROM", APART_FROM)
    for ours, exact in zip(found, rolled(model, **options), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["full", "selective", "products"])
def test_with_checkpoints(make_model, count, kind):
    plain = rolled(make_model())
    for ours, exact in zip(rolled(parallelize(make_model(), checkpoint=kind), replay=True), plain, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def cached_pass(model, room=9):
    """A cache of six frames, and what a pass behind it is given."""
    values = given()
    prompt, time = values["prompt_embeds"], torch.full((2,), 500.0)
    cache = KVCache(reserve=room)
    with torch.no_grad():
        for start in (0, 3):
            _, kv, _ = model(values["noise"][:, start : start + 3], time, prompt, cache=cache)
            cache = append(cache, kv, tuple(range(start, start + 3)))
    return (values["noise"][:, 6:9], time, prompt), cache


def test_a_pass_that_will_be_replayed_computes_the_same_bits(make_model, count):
    """Without gradient it writes into the cache's space, with gradient it does not."""
    model = make_model(torch.float32)
    inputs, cache = cached_pass(model)
    inputs = tuple(x.float() for x in inputs)
    with torch.no_grad(), as_with_gradient():
        first, kv, _ = model(*inputs, cache=cache)
    again, kv_again, _ = model(*inputs, cache=cache)
    assert len(count) == 2
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for one, other in zip(kv, kv_again, strict=True) for a, b in zip(one, other, strict=True))


def test_passes_that_nobody_differentiates_stay_as_they_are(make_model, count):
    model = make_model()
    inputs, cache = cached_pass(model)
    with torch.no_grad():
        model(*inputs, cache=cache)
    with exact_derivatives():
        torch.func.jvp(lambda x: model(x, *inputs[1:], cache=cache)[0], inputs[:1], inputs[:1])
    torch.func.grad(lambda x: model(x, *inputs[1:], cache=cache)[0].sum())(inputs[0])
    assert not count


@pytest.mark.parametrize("kind", ["none", "selective"])
def test_one_graph_serves_any_number_of_keys(make_model, count, kind):
    torch._dynamo.reset()
    graphs, model = [], parallelize(make_model(), checkpoint=kind)
    plain = rolled(make_model())

    def compiled(graph, example):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=compiled, fullgraph=True, dynamic=False)
    for ours, exact in zip(rolled(model), plain, strict=True):
        torch.testing.assert_close(ours, exact)
    assert len(graphs) == 4
    torch._dynamo.reset()


def cached(tokens, device="cpu", dtype=torch.float32):
    return [[(torch.zeros(1, tokens, 1, 8, device=device, dtype=dtype),) * 2] for _ in range(2)]


LONG = APART_FROM + 1


@pytest.mark.parametrize(
    ("chunks", "backend", "dtype", "expected"),
    [
        ([], "auto", torch.float32, False),
        (cached(APART_FROM), "auto", torch.float32, False),
        (cached(LONG), "auto", torch.float32, True),
        (cached(LONG), "math", torch.float32, False),
        (cached(LONG), "auto", torch.bfloat16, False),  # is cast, and so copied
        (cached(LONG, "meta"), "auto", torch.float32, False),
        (cached(LONG, "meta"), "flash_split_kv", torch.float32, True),
        ([[(pack(k, "fp8"), pack(v, "fp8")) for k, v in layer] for layer in cached(LONG)], "auto", torch.float32, False),
    ],
)
def test_when_it_pays(chunks, backend, dtype, expected):
    assert attends_apart(chunks, backend, dtype) == expected


def test_gradient_of_any_layer_s_context_needs_the_joined_copy():
    first, last = cached(LONG)
    asking = [(k.clone().requires_grad_(), v) for k, v in last]
    assert not attends_apart([first, asking], "auto", torch.float32)


def test_what_flash_cannot_do_is_still_named(make_model, count):
    model = make_model()
    inputs, cache = cached_pass(model)
    model.backend = "flash"
    with pytest.raises(Exception, match="needs bf16 or fp16 on CUDA"):
        model(*inputs, cache=cache)
