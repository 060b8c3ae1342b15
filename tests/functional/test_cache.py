from __future__ import annotations

import copy
import dataclasses
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from sftk.errors import ShapeError
from sftk.functional import Block, KVCache, append, forget_text, start_cache, window
from sftk.functional.cache import detach, free_space, straight_through, take_rows

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


# Room


def drawn(frames, seed, grad=False):
    """Keys and values of one layer over frames of two tokens, and their text."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, frames * 2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    text = torch.ones(2, 5, 3, 4, dtype=torch.float64)
    return ((k.requires_grad_(grad), v.requires_grad_(grad), text, text),)


def filled(cache, lengths, seed=0):
    caches, start = [cache], 0
    for index, length in enumerate(lengths):
        caches.append(append(caches[-1], drawn(length, seed + index), tuple(range(start, start + length))))
        start += length
    return caches


@given(
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    reserve=st.integers(0, 12),
    storage=st.sampled_from(["full", "int8", "fp8"]),
)
def test_room_changes_no_value_of_any_cache(lengths, reserve, storage):
    plain, roomy = (filled(KVCache(storage=storage, reserve=n), lengths) for n in (0, reserve))
    for one, other in zip(plain, roomy, strict=True):
        assert one.positions == other.positions
        for a, b in zip(one.layer(0) or (), other.layer(0) or (), strict=True):
            assert torch.equal(a, b)
    fits = sum(lengths) <= reserve and lengths[0] < reserve
    assert not fits or len(roomy[-1].chunks) == 1


def test_caches_that_part_share_no_room():
    """Two caches made from one: the first goes on in its room, the second has its own."""
    common = filled(KVCache(reserve=9), [2, 1])[-1]
    one, other = (append(common, drawn(2, seed), (3, 4)) for seed in (7, 8))
    assert (len(one.chunks), len(other.chunks)) == (1, 2)
    for cache, seed in ((one, 7), (other, 8)):
        k, _ = cache.layer(0)
        assert torch.equal(k[:, 6:], drawn(2, seed)[0][0])
        assert torch.equal(k[:, :6], common.layer(0)[0])


def test_what_is_remembered_for_a_backward_pass_stays_whole():
    """Autograd saved the shorter cache; what is written behind it is no change of it."""
    short = filled(KVCache(reserve=9), [2])[-1]
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    out = (short.chunks[0].layers[0][0] * w).sum()
    longer = append(short, drawn(3, 5), (2, 3, 4))
    (grad,) = torch.autograd.grad(out, w)
    torch.testing.assert_close(grad, short.layer(0)[0].sum()[None])
    assert longer.frames == 5


def test_what_carries_gradient_keeps_it():
    cache = append(filled(KVCache(reserve=9), [2])[-1], drawn(1, 3, grad=True), (2,))
    assert len(cache.chunks) == 2
    assert cache.layer(0)[0].requires_grad
    started = append(KVCache(reserve=9), drawn(1, 3, grad=True), (0,))
    assert started.chunks[0].room is None


def space_behind(cache, frames, **other):
    return free_space(cache, frames, **{"batch": 2, "tokens": 2, "dtype": torch.float64, **other})


def test_free_space_lies_behind_what_is_cached():
    caches = filled(KVCache(reserve=6), [2, 1])
    assert space_behind(caches[0], 1) is None
    assert space_behind(caches[1], 1) is None  # its room has gone on
    assert space_behind(caches[2], 4) is None
    for other in ({"batch": 1}, {"tokens": 1}, {"dtype": torch.float32}):
        assert space_behind(caches[2], 3, **other) is None
    ((k, v),) = space_behind(caches[2], 3).layers
    before = [tensor.clone() for tensor in caches[2].layer(0)]
    version = caches[2].layer(0)[0]._version
    for whole, own in ((k, before[0]), (v, before[1])):
        assert whole.shape == (2, 12, 3, 4)
        assert torch.equal(whole[:, :6], own)
        whole[:, 6:] = 5.0
    assert caches[2].layer(0)[0]._version == version
    for found, own in zip(caches[2].layer(0), before, strict=True):
        assert torch.equal(found, own)
    assert torch.equal(append(caches[2], drawn(3, 4), (3, 4, 5)).layer(0)[0][:, 6:], drawn(3, 4)[0][0])


def lent_after(cache, frames, value):
    """What a pass returns that wrote `value` into the space behind a cache."""
    space = space_behind(cache, frames)
    for whole in space.layers[0]:
        whole[:, -2 * frames :] = value
    return space.lend(cache.text)


def values(kv):
    return {float(tensor.unique()) for tensor in kv[0][:2]}


@pytest.mark.parametrize("read_first", [False, True])
def test_what_a_pass_wrote_is_a_value(read_first):
    """Later passes and appends write to the same space; who holds an earlier result never sees it."""
    cache = filled(KVCache(reserve=6), [2])[-1]
    first = lent_after(cache, 1, 1.0)
    assert not read_first or values(first) == {1.0}
    second = lent_after(cache, 2, 2.0)
    longer = append(cache, second, (2, 3))
    assert (len(longer.chunks), longer.chunks[0].room) == (1, cache.chunks[0].room)
    third = lent_after(longer, 1, 3.0)
    other = append(cache, first, (2,))  # the room has gone on without it
    assert len(other.chunks) == 2
    end = append(longer, drawn(1, 6), (4,))
    assert [values(kv) for kv in (first, second, third)] == [{1.0}, {2.0}, {3.0}]
    assert first[0][0].shape == (2, 2, 3, 4)
    assert longer.layer(0)[0][:, 4:].unique().tolist() == [2.0]
    assert other.layer(0)[1][:, 4:].unique().tolist() == [1.0]
    assert torch.equal(end.layer(0)[0][:, 8:], drawn(1, 6)[0][0])
    assert [len(tree) for tree in (pytree.tree_leaves(third), list(third))] == [4, 1]


def test_what_a_pass_wrote_is_cached_where_it_is():
    cache = filled(KVCache(reserve=6), [2])[-1]
    kv = lent_after(cache, 2, 2.0)
    longer = append(cache, kv, (2, 3))
    assert longer.chunks[0].layers[0][0].data_ptr() == cache.chunks[0].room.layers[0][0].data_ptr()
    assert kv._space is not None  # nothing was copied
    assert values(kv) == {2.0}
    again = append(cache, kv, (2, 3))
    assert torch.equal(again.layer(0)[0], longer.layer(0)[0])


def test_a_pass_that_is_cached_where_it_is_brings_its_text():
    cache = filled(KVCache(reserve=6), [2])[-1]
    kv = lent_after(cache, 2, 2.0)
    longer = append(forget_text(cache), kv, (2, 3))
    assert len(longer.chunks) == 1
    assert longer.text is kv.text


def test_a_copy_of_what_a_pass_wrote_holds_no_room():
    cache = filled(KVCache(reserve=6), [2])[-1]
    room, kv = weakref.ref(cache.chunks[0].room), lent_after(cache, 2, 2.0)
    assert values(kv) == {2.0}
    del cache
    assert room() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_caches_and_what_passes_wrote_can_be_copied(copied):
    cache = filled(KVCache(reserve=6), [2])[-1]
    kv = lent_after(cache, 2, 2.0)
    other_cache, other_kv = copied(cache), copied(kv)
    lent_after(cache, 1, 3.0)
    assert isinstance(other_kv, tuple)
    assert values(other_kv) == {2.0}
    for found, own in zip(append(other_cache, kv, (2, 3)).layer(0), append(cache, kv, (2, 3)).layer(0), strict=True):
        assert torch.equal(found, own)


@pytest.mark.parametrize("change", [lambda t: t[:, : t.shape[1] // 2], lambda t: t[:1], lambda t: t.float()])
def test_what_is_of_another_kind_has_a_chunk_of_its_own(change):
    """Other tokens to a frame, other samples, another dtype: as without room."""
    kv = tuple(tuple(change(tensor) for tensor in layer) for layer in drawn(2, 5))
    cache = append(filled(KVCache(reserve=6), [2])[-1], kv, (2, 3))
    assert len(cache.chunks) == 2
    for found, own in zip(cache.chunks[1].layers[0], kv[0][:2], strict=True):
        assert torch.equal(found, own)
        assert found.dtype == own.dtype


@torch.no_grad()
def test_packed_values_that_would_carry_gradient_have_a_chunk_of_their_own():
    cache = filled(KVCache(storage="int8", reserve=6), [2])[-1]
    assert len(append(cache, drawn(2, 5, grad=True), (2, 3)).chunks) == 2


def test_a_cache_of_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        cache = filled(KVCache(reserve=6), [2])[-1]
    with torch.no_grad():
        cache = append(cache, lent_after(cache, 2, 2.0), (2, 3))
        cache = append(cache, drawn(1, 5), (4,))
    assert (len(cache.chunks), cache.frames) == (1, 5)


def test_windows_and_rows_of_a_cache_with_room_are_as_ever():
    plain, roomy = (filled(KVCache(reserve=n), [2, 1, 2])[-1] for n in (0, 9))
    for change in (lambda c: window(c, size=3, sink=1), lambda c: take_rows(c, 1, 2), detach):
        one, other = change(plain), change(roomy)
        assert one.positions == other.positions
        assert torch.equal(one.layer(0)[0], other.layer(0)[0])
        more = tuple(tuple(tensor[: len(one.layer(0)[0])] for tensor in layer) for layer in drawn(1, 9))
        assert torch.equal(append(one, more, (5,)).layer(0)[0], append(other, more, (5,)).layer(0)[0])


@pytest.mark.parametrize(
    ("blocks", "options", "reserve"),
    [
        (7, {}, 21),
        (7, {"rope": "relative"}, 18),  # what is read is a copy: no pass writes its own behind it
        (7, {"kv_cache": "int8"}, 18),
        (7, {"window": 21}, 21),
        (7, {"window": 20}, 0),
        (7, {"max_context_frames": 18}, 0),
        (1, {}, 0),
        (33, {}, 99),
        (34, {}, 0),  # longer than what is reserved at once
    ],
)
def test_room_is_made_for_what_will_be_kept(blocks, options, reserve):
    planned = tuple(Block(index=i, start=3 * i, frames=3, offset=3 * i) for i in range(blocks))
    assert start_cache(planned, **options).reserve == reserve


def test_given_frames_have_room_too():
    planned = tuple(Block(index=i, start=3 * i + 2, frames=3, offset=3 * i) for i in range(3))
    assert start_cache(planned, (Block(index=0, start=0, frames=2, offset=0),)).reserve == 2 + 3 * 3
