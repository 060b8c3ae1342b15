"""Splitting tokens and heads over ranks, without ranks: what each sends is moved by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sftk.errors import ShapeError
from sftk.functional.token_split import TokenSplit


def deliver(sent: list[Tensor], sizes: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    """What an all-to-all leaves on each rank, given what each sends and its (come, go)."""
    go = [rank.split(split) for rank, (_, split) in zip(sent, sizes, strict=True)]
    for rank, (come, _) in enumerate(sizes):
        assert [len(other[rank]) for other in go] == come
    return [torch.cat([other[rank] for other in go]) for rank in range(len(sent))]


@st.composite
def passes(draw):
    degree = draw(st.integers(1, 5))
    tokens = draw(st.integers(degree, degree + 7))
    batch, frames, heads, count = draw(st.tuples(*[st.integers(1, 3)] * 4))
    return degree, tokens, torch.randn(count, batch, frames * tokens, degree * heads, 2), frames


@given(passes())
def test_every_rank_gets_all_tokens_of_its_heads_and_back(drawn):
    degree, tokens, whole, frames = drawn
    ranks = [TokenSplit(frames, tokens, degree, rank) for rank in range(degree)]
    mine = [tuple(split.part(x) for x in whole) for split in ranks]
    assert sum(x[0].shape[1] for x in mine) == frames * tokens
    assert max(ranks[0].sizes) - min(ranks[0].sizes) <= 1

    sent = [split.split_heads(x) for split, x in zip(ranks, mine, strict=True)]
    arrived = deliver(sent, [split.sizes_to_heads(len(flat)) for split, flat in zip(ranks, sent, strict=True)])
    by_head = [split.join_tokens(x, parts[0].shape, len(parts)) for split, x, parts in zip(ranks, arrived, mine, strict=True)]
    for rank, found in enumerate(by_head):
        expected = whole.unflatten(3, (degree, -1))[:, :, :, rank]
        assert torch.equal(torch.stack(found), expected)
        assert len({x.untyped_storage().data_ptr() for x in found}) == len(found), "results share memory"

    sent = [split.split_tokens(x) for split, x in zip(ranks, by_head, strict=True)]
    arrived = deliver(sent, [split.sizes_to_tokens(len(flat)) for split, flat in zip(ranks, sent, strict=True)])
    for split, x, heads, parts in zip(ranks, arrived, by_head, mine, strict=True):
        back = split.join_heads(x, heads[0].shape, len(heads))
        assert all(torch.equal(one, other) for one, other in zip(back, parts, strict=True))


def test_frames_are_cut_alike():
    split = TokenSplit(frames=2, tokens=7, degree=3, rank=1)
    assert split.sizes == (3, 2, 2)
    assert split.part(torch.arange(14)[None]).tolist() == [[3, 4, 10, 11]]


def test_fewer_tokens_than_ranks():
    with pytest.raises(ShapeError, match="a frame of 2 tokens cannot be split over 3 ranks"):
        TokenSplit(frames=1, tokens=2, degree=3, rank=0)
