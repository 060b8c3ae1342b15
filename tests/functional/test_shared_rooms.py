"""Caches that share a room, against caches without one: plain values."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftk.functional import KVCache, append, forget_text, window
from sftk.functional.cache import detach, free_space, straight_through, take_rows

BATCH, TOKENS = 2, 2
FRAMES, BACK = st.integers(1, 3), st.sampled_from([0, 0, 0, 1, 2])  # of a pass or an append; how many caches or results ago
CHANGES = {"as it is": lambda cache: cache, "detach": detach, "forget_text": forget_text}


def layers_of(value, frames):
    """Keys and values of one layer, other numbers for each sample and token; text that is another one for each pass."""
    tokens = value + torch.arange(BATCH * frames * TOKENS).reshape(BATCH, frames * TOKENS, 1, 1) / 1000
    return ((tokens, -tokens, torch.full((BATCH, 1, 1, 1), value), torch.full((BATCH, 1, 1, 1), -value)),)


def passed(cache, value, frames):
    """What a pass without gradient returns, which writes behind the cache where there is space."""
    ((k, v, *text),) = layers_of(value, frames)
    text_kv = cache.text or (tuple(text),)
    space = free_space(cache, frames, batch=BATCH, tokens=TOKENS, dtype=k.dtype)
    if space is None:
        return tuple((k, v, *pair) for pair in text_kv)
    for whole, cached, own in zip(space.layers[0], cache.layer(0), (k, v), strict=True):
        assert torch.equal(whole[:, : -frames * TOKENS], cached)
        whole[:, -frames * TOKENS :] = own
    return space.lend(text_kv)


def with_gradient(kv):
    return straight_through(kv, tuple(tuple(tensor.clone().requires_grad_() for tensor in layer) for layer in kv))


def appended(cache, kv, frames):
    return append(cache, kv, tuple(range(cache.frames, cache.frames + frames)))


def agree(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same(one, other):
    texts = [[tensor for pair in cache.text or () for tensor in pair] for cache in (one, other)]
    return one.positions == other.positions and agree(one.layer(0) or (), other.layer(0) or ()) and agree(*texts)


def tensors(kv):
    return [tensor for layer in kv for tensor in layer]


def ago(items, back):
    return items[max(-1 - back, -len(items))]


@settings(max_examples=400)
@given(
    reserve=st.integers(4, 12),
    storage=st.sampled_from(["full", "full", "full", "int8"]),
    operations=st.lists(
        st.one_of(
            st.tuples(st.just("pass"), BACK, FRAMES),
            st.tuples(st.just("append what a pass wrote"), BACK, BACK),
            st.tuples(st.just("pass and append"), BACK, FRAMES, st.sampled_from(list(CHANGES)), st.integers(1, 2)),
            st.tuples(st.just("append"), BACK, FRAMES, st.sampled_from([True, False, False, False])),
            st.tuples(st.just("window"), BACK, st.integers(0, 8), st.integers(0, 2)),
            st.tuples(st.sampled_from(list(CHANGES)), BACK),
            st.tuples(st.just("read"), BACK),
            st.tuples(st.just("drop results")),
        ),
        min_size=4,
        max_size=16,
    ),
)
def test_no_room_changes_a_value(reserve, storage, operations):
    """Whatever passes, appends and reads follow one another: all caches and results are those without room."""
    start = layers_of(0.5, 1)
    caches = [tuple(appended(KVCache(reserve=n, storage=storage), start, 1) for n in (reserve, 0))]
    results = []
    for value, (name, *arguments) in enumerate(operations, start=1):
        pair = ago(caches, arguments[0] if arguments else 0)
        if name in ("pass", "pass and append"):
            found = [passed(cache, float(value), arguments[1]) for cache in pair]
            if name == "pass":
                results.append((found, arguments[1]))
            else:
                pair = tuple(CHANGES[arguments[2]](cache) for cache in pair)
                for _ in range(arguments[3]):
                    pair = tuple(appended(cache, kv, arguments[1]) for cache, kv in zip(pair, found, strict=True))
                    caches.append(pair)
            del found
        elif name == "append what a pass wrote" and results:
            found, frames = ago(results, arguments[1])
            caches.append(tuple(appended(cache, kv, frames) for cache, kv in zip(pair, found, strict=True)))
        elif name == "append":
            kv = layers_of(float(value), arguments[1])
            caches.append(tuple(appended(cache, with_gradient(kv) if arguments[2] else kv, arguments[1]) for cache in pair))
        elif name == "window":
            size, sink = max(arguments[1:]), arguments[2]
            caches.append(tuple(window(cache, size=size, sink=sink) for cache in pair))
        elif name in CHANGES:
            caches.append(tuple(CHANGES[name](cache) for cache in pair))
        elif name == "read" and results:
            assert agree(*(tensors(kv) for kv in ago(results, arguments[0])[0]))
        elif name == "drop results":
            results.clear()
    for one, other in caches:
        assert same(one, other)
        assert same(take_rows(one, 1, 2), take_rows(other, 1, 2))
    for found, _ in results:
        assert agree(*(tensors(kv) for kv in found))
