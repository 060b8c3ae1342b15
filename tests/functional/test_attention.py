from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftk.errors import ShapeError, SpecError
from sftk.functional import Layout, attention, available_backends
from sftk.functional.attention import attention_mask
from sftk.functional.layout import check_layout, token_mask

CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


def brute_force(layout: Layout) -> list[list[bool]]:
    block = [i for i, n in enumerate(layout.blocks) for _ in range(n)]
    ends = [sum(layout.blocks[: b + 1]) for b in block]
    frames = len(block)

    def causal(q: int, k: int) -> bool:
        inside = layout.window is None or k >= ends[q] - (layout.window - layout.sink) or k < layout.sink
        return k < ends[q] and inside

    if layout.kind == "block_causal":
        return [[causal(q, k) for k in range(frames)] for q in range(frames)]

    def forced(q: int, k: int) -> bool:
        if q < frames:
            return k < frames and block[k] <= block[q]
        own, other = block[q - frames], block[k % frames]
        return other < own if k < frames else other == own

    return [[forced(q, k) for k in range(2 * frames)] for q in range(2 * frames)]


@given(blocks=lengths, window=st.none() | st.integers(1, 8), sink=st.integers(0, 3))
def test_block_causal_mask_against_brute_force(blocks, window, sink):
    window = window if window is None else max(window, max(blocks) + sink)
    layout = Layout(kind="block_causal", blocks=blocks, window=window, sink=sink)
    assert layout.frame_mask().tolist() == brute_force(layout)
    assert layout.frames == sum(blocks)
    assert layout.positions == tuple(range(sum(blocks)))


@given(blocks=lengths)
def test_teacher_forcing_mask_against_brute_force(blocks):
    layout = Layout(kind="teacher_forcing", blocks=blocks)
    assert layout.frame_mask().tolist() == brute_force(layout)
    assert layout.frames == 2 * sum(blocks)
    assert layout.positions == tuple(range(sum(blocks))) * 2


@given(blocks=lengths, tokens=st.integers(1, 3), kind=st.sampled_from(["block_causal", "teacher_forcing"]))
def test_token_mask_repeats_the_frame_mask(blocks, tokens, kind):
    layout = Layout(kind=kind, blocks=blocks)
    mask, frames = token_mask(layout, tokens, CPU), layout.frame_mask()
    length = layout.frames * tokens
    assert mask.shape == (length, length)
    index = torch.arange(length) // tokens
    assert torch.equal(mask, frames[index][:, index])


def test_every_frame_sees_itself():
    for window in (None, 1, 2):
        layout = Layout(kind="block_causal", blocks=(1, 1, 1), window=window)
        assert layout.frame_mask().diagonal().all()


def test_check_layout():
    check_layout(None, 5)
    with pytest.raises(ShapeError, match="is for 4 frames, found 3"):
        check_layout(Layout(kind="teacher_forcing", blocks=(2,)), 3)


def reference(q, k, v, mask):
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v)


LAYOUTS = {
    "none": None,
    "block_causal": Layout(kind="block_causal", blocks=(1, 2, 2)),
    "window": Layout(kind="block_causal", blocks=(1, 2, 2), window=3, sink=1),
    "teacher_forcing": Layout(kind="teacher_forcing", blocks=(1, 2, 2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math", "flex"])
def test_backends_agree_with_the_formula(randn, backend, name):
    layout, tokens = LAYOUTS[name], 3
    length = tokens * (5 if layout is None else layout.frames)
    mask = attention_mask(layout, tokens, CPU, backend)
    dense = None if layout is None else token_mask(layout, tokens, CPU)
    inputs = [randn(2, length, 2, 8).requires_grad_() for _ in range(3)]
    found, expected = attention(*inputs, mask=mask, backend=backend), reference(*inputs, dense)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = randn(*found.shape)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_flex_mask_of_a_length_that_is_no_multiple_of_its_block(randn):
    layout = Layout(kind="block_causal", blocks=(1, 1, 1))
    inputs = [randn(1, 3 * 50, 1, 8) for _ in range(3)]
    found = attention(*inputs, mask=attention_mask(layout, 50, CPU, "flex"), backend="flex")
    torch.testing.assert_close(found, reference(*inputs, token_mask(layout, 50, CPU)), rtol=1e-10, atol=1e-12)


def test_math_has_second_derivatives(randn):
    inputs = [randn(1, 3, 1, 4).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, backend="math"), inputs)


def test_keys_may_be_longer_than_queries(randn):
    q, k, v = randn(1, 2, 1, 4), randn(1, 5, 1, 4), randn(1, 5, 1, 4)
    for backend in ("sdpa", "math", "flex"):
        torch.testing.assert_close(attention(q, k, v, backend=backend), reference(q, k, v, None))


def test_masks_are_made_once_and_serve_training_after_sampling(randn):
    layout = Layout(kind="block_causal", blocks=(2, 1, 1))
    token_mask.cache_clear()
    with torch.inference_mode():
        mask = attention_mask(layout, 2, CPU)
    assert attention_mask(layout, 2, CPU) is mask
    q = randn(1, 8, 1, 4).requires_grad_()
    attention(q, q, q, mask=mask).sum().backward()
    assert q.grad is not None


def test_shape_errors(randn):
    q = randn(1, 4, 2, 8)
    for k, v in ((randn(1, 4, 2, 4), randn(1, 4, 2, 4)), (q, randn(1, 5, 2, 8)), (randn(2, 4, 2, 8), randn(2, 4, 2, 8))):
        with pytest.raises(ShapeError, match=r"attention takes \[B, L, H, D\]"):
            attention(q, k, v)
    with pytest.raises(ShapeError, match=r"found q \[4, 2, 8\]"):
        attention(q[0], q[0], q[0])


def test_flash_says_what_it_needs(randn):
    q = randn(1, 4, 2, 8)
    with pytest.raises(SpecError, match=r"needs bf16 or fp16 on CUDA without a mask, found torch.float64 on cpu; use 'sdpa'"):
        attention(q, q, q, backend="flash")
    assert {"sdpa", "math", "flex"} <= set(available_backends())


def test_a_layout_refuses_a_window_it_cannot_keep():
    with pytest.raises(ShapeError, match="cannot hold a block of 2 and 1 sink frames"):
        Layout(kind="block_causal", blocks=(1, 2), window=2, sink=1)
    with pytest.raises(ShapeError, match="sees every clean frame"):
        Layout(kind="teacher_forcing", blocks=(1, 1), window=2)
