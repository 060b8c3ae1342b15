from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from sftk.errors import ShapeError
from sftk.functional import KVCache, append, window
from sftk.functional.cache import detach, straight_through, take_rows

TOKENS = 2


def kv_of(frames: list[int], layers: int = 2):
    """Keys that hold their frame's number, layer by layer; values are their negatives."""
    layered = []
    for layer in range(layers):
        k = torch.tensor([float(f + 100 * layer) for f in frames for _ in range(TOKENS)])[None, :, None, None]
        layered.append((k, -k, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)))
    return tuple(layered)


def content(cache: KVCache) -> list[list[float]]:
    return [[] if cache.layer(i) is None else cache.layer(i)[0][0, ::TOKENS, 0, 0].tolist() for i in range(2)]


operation = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 4)),
    st.tuples(st.just("window"), st.integers(0, 8), st.integers(0, 4)),
)


@given(operations=st.lists(operation, max_size=12))
def test_cache_behaves_like_a_list(operations):
    cache, model, count, history = KVCache(), [], 0, []
    for name, *arguments in operations:
        history.append((cache, list(model)))
        if name == "append":
            frames = list(range(count, count + arguments[0]))
            count += arguments[0]
            cache, model = append(cache, kv_of(frames), tuple(frames)), model + frames
            continue
        size, sink = arguments
        if len(model) > size:
            if size < sink:
                with pytest.raises(ShapeError, match="cannot hold"):
                    window(cache, size=size, sink=sink)
                continue
            model = model[:sink] + model[len(model) - (size - sink) :]
        cache = window(cache, size=size, sink=sink)
    for value, frames in [*history, (cache, model)]:
        assert list(value.positions) == frames
        assert value.frames == len(frames)
        assert content(value) == [[float(f + 100 * layer) for f in frames] for layer in range(2)]
        if value.chunks:
            k, v = value.layer(1)
            assert torch.equal(k, -v)


def test_window_none_keeps_all_and_returns_the_same_value():
    cache = append(KVCache(), kv_of([0, 1, 2]), (0, 1, 2))
    assert window(cache, size=None) is cache
    assert window(cache, size=3) is cache


def test_append_shares_the_past():
    parent = append(KVCache(), kv_of([0, 1]), (0, 1))
    child = append(parent, kv_of([2]), (2,))
    assert child.chunks[0] is parent.chunks[0]


def test_append_checks_the_tokens():
    with pytest.raises(ShapeError, match="4 tokens do not divide into 3 frames"):
        append(KVCache(), kv_of([0, 1]), (0, 1, 2))
    with pytest.raises(ShapeError, match="4 tokens do not divide into 0 frames"):
        append(KVCache(), kv_of([0, 1]), ())


def test_text_is_that_of_the_first_append_and_has_no_history():
    kv = kv_of([0], layers=1)
    text = torch.full((1, 1, 1, 1), 7.0, requires_grad=True) * 1
    cache = append(KVCache(), [(*kv[0][:2], text, text)], (0,))
    assert cache.text is not None
    assert cache.text[0][0].item() == 7.0
    assert not cache.text[0][0].requires_grad
    assert append(cache, kv, (1,)).text is cache.text
    assert window(append(cache, kv, (1,)), size=0).text is cache.text


def test_pytree_round_trip():
    cache = append(append(KVCache(rope="relative"), kv_of([0, 1]), (0, 1)), kv_of([2]), (2,))
    leaves, spec = pytree.tree_flatten(cache)
    assert len(leaves) == 2 * 2 * 2 + 2 * 2
    back = pytree.tree_unflatten(leaves, spec)
    assert (back.positions, back.rope, content(back)) == (cache.positions, "relative", content(cache))
    double = pytree.tree_map(lambda x: 2 * x, cache)
    assert content(double)[0] == [0.0, 2.0, 4.0]
    assert content(cache)[0] == [0.0, 1.0, 2.0]


def test_detach_cuts_history():
    kv = tuple(tuple(x.clone().requires_grad_() for x in layer) for layer in kv_of([0, 1]))
    cache = append(KVCache(), kv, (0, 1))
    assert cache.layer(0)[0].requires_grad
    assert not any(x.requires_grad for x in detach(cache).layer(0))


def test_straight_through_takes_value_here_and_gradient_there():
    context, path = kv_of([3]), tuple(tuple(x.clone().requires_grad_() for x in layer) for layer in kv_of([8]))
    (first, second) = straight_through(context, path)
    assert torch.equal(first[0], context[0][0])
    (first[0].sum() * 2 + second[1].sum() * 5).backward()
    assert (path[0][0].grad == 2).all()
    assert (path[1][1].grad == 5).all()
    assert first[2] is context[0][2]


def test_values_are_frozen():
    with pytest.raises(AttributeError):
        KVCache().chunks = ()  # pyright: ignore[reportAttributeAccessIssue]


STORAGES = pytest.mark.parametrize("storage", ["fp8", "int8"])


def random_kv(frames: int, layers: int = 2, batch: int = 2):
    return tuple(tuple(torch.randn(batch, frames * TOKENS, 2, 16) for _ in range(4)) for _ in range(layers))


def tensors(cache: KVCache):
    return [leaf for leaf in pytree.tree_leaves(cache) if isinstance(leaf, torch.Tensor)]


@STORAGES
def test_a_packed_cache_takes_less_and_is_close(storage):
    kv = random_kv(3)
    full, packed = append(KVCache(), kv, (0, 1, 2)), append(KVCache(storage=storage), kv, (0, 1, 2))
    sizes = [sum(leaf.nbytes for leaf in tensors(dataclasses.replace(cache, text=None))) for cache in (full, packed)]
    assert sizes[1] == sizes[0] / 4 * (1 + 4 / 16)  # float32 before; a byte each and a float32 for 16 of them now
    for exact, close in zip(full.layer(1), packed.layer(1), strict=True):
        assert (close - exact).norm() < 0.05 * exact.norm()
        assert not torch.equal(close, exact)


@STORAGES
def test_a_packed_cache_windows_splits_and_detaches_as_a_full_one(storage):
    first, second = random_kv(3), random_kv(3)

    def build(storage):
        return append(append(KVCache(storage=storage), first, (0, 1, 2)), second, (3, 4, 5))

    full, packed = build("full"), build(storage)
    for change in (
        lambda cache: window(cache, size=4, sink=1),
        lambda cache: take_rows(cache, 1, 2),
        detach,
        lambda cache: pytree.tree_map(lambda leaf: leaf, cache),
    ):
        one, other = change(full), change(packed)
        assert other.positions == one.positions
        assert (other.storage, other.rope) == (storage, "absolute")
        for exact, close in zip(one.layer(0), other.layer(0), strict=True):
            assert close.shape == exact.shape
            assert (close - exact).norm() < 0.05 * exact.norm()
    whole = build(storage).layer(0)
    for part, all_of_it in zip(window(packed, size=3).layer(0), whole, strict=True):
        assert torch.equal(part, all_of_it[:, 3 * TOKENS :])


@STORAGES
def test_gradient_reaches_packed_keys_straight_through(storage):
    context, made = random_kv(3), tuple(tuple(t.requires_grad_() for t in layer) for layer in random_kv(3))
    cache = append(KVCache(storage=storage), straight_through(context, made), (0, 1, 2))
    k, v = cache.layer(1)
    assert (k - context[1][0]).norm() < 0.05 * context[1][0].norm()
    found = torch.autograd.grad((2 * k - v).sum(), made[1][:2])
    assert [g.unique().tolist() for g in found] == [[2.0], [-1.0]]
    assert not any(t.requires_grad for t in tensors(detach(cache)))
