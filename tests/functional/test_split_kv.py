"""Attention over parts of the keys: how they are joined, when they are taken, and what a compiler makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from sftk.errors import SpecError
from sftk.functional import flash as flash_module
from sftk.functional.attention import attention
from sftk.functional.split_kv import PARTS, flash_partials, merge_partials, split_kv_attention


def partial(q, k, v):
    """Attention of [B, L, H, D] and its log-sum-exp [B, H, Lq]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    queries=st.integers(1, 4),
    heads=st.integers(1, 3),
    sharpness=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    seed=st.integers(0, 99),
)
def test_parts_are_joined_to_attention_over_all_keys(counts, batch, queries, heads, sharpness, seed):
    """Of any sizes, also where the scores are far apart, very large and very small."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, 4, dtype=torch.float64, generator=generator) for n in (queries, *[sum(counts)] * 2))
    q = q * sharpness
    found = [partial(q, *parts) for parts in zip(k.split(counts, 1), v.split(counts, 1), strict=True)]
    outs, lses = (torch.stack(each) for each in zip(*found, strict=True))
    torch.testing.assert_close(merge_partials(outs, lses), attention(q, k, v, backend="math"), rtol=1e-9, atol=1e-9)


@given(shift=st.floats(-1e30, 1e30), apart=st.floats(0, 1e30), seed=st.integers(0, 9))
def test_only_differences_of_the_log_sum_exps_count(shift, apart, seed):
    """In the dtypes of the kernels: nothing overflows, and each output lies between those of the parts."""
    outs = torch.randn(2, 1, 3, 2, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()
    lses = torch.full((2, 1, 2, 3), shift)
    assert torch.equal(merge_partials(outs, lses), outs.float().mean(0).bfloat16())
    lses[1] -= apart
    found = merge_partials(outs, lses)
    assert found.dtype == torch.bfloat16
    assert ((found >= outs.amin(0)) & (found <= outs.amax(0))).all()
    lses[1] = -torch.inf  # no keys at all
    assert torch.equal(merge_partials(outs, lses), outs[0])


def drawn(batch=1, keys=8, queries=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(keys)
    return tuple(torch.randn(batch, n, 3, 8, generator=generator, dtype=dtype) for n in (queries, keys, keys))


@pytest.fixture
def version_4(kernels, monkeypatch):
    """FlashAttention 4 is installed, and runs on the CPU."""
    monkeypatch.setattr(flash_module, "_installed", lambda: flash_module.MODULES[0])
    return kernels


@pytest.mark.parametrize("keys", [8, 9])
def test_the_operator_keeps_its_promises(version_4, keys):
    opcheck(flash_partials, drawn(keys=keys), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@torch.no_grad()
def test_parts_of_a_longer_buffer_are_not_copied(version_4):
    q, k, v = drawn(keys=20)
    found = split_kv_attention(q, k[:, :12], v[:, :12])
    torch.testing.assert_close(found, attention(q, k[:, :12], v[:, :12], backend="math"))
    assert version_4.calls == ["forward"]
    assert [x.shape for x in version_4.given] == [(PARTS, 5, 3, 8), (PARTS, 6, 3, 8), (PARTS, 6, 3, 8)]
    for own, whole in zip(version_4.given, (q, k, v), strict=True):
        assert own.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("case", ["odd", "samples", "gradient"])
def test_what_cannot_be_split_is_flash(version_4, case):
    q, k, v = drawn(batch=2 if case == "samples" else 1, keys=9 if case == "odd" else 8)
    with torch.set_grad_enabled(case == "gradient"):
        leaves = [x.requires_grad_(case == "gradient") for x in (q, k, v)]
        found = split_kv_attention(*leaves)
        assert version_4.given[0].shape == q.shape
        assert torch.equal(found, flash_module.flash_attention(*leaves))
    if case == "gradient":
        exact = torch.autograd.grad(attention(*leaves, backend="math").sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), exact)


@pytest.mark.parametrize("installed", [None, *flash_module.MODULES[1:]])
def test_it_needs_version_4(monkeypatch, installed):
    monkeypatch.setattr(flash_module, "_installed", lambda: installed)
    with pytest.raises(SpecError, match="'flash_split_kv' needs FlashAttention 4"):
        split_kv_attention(*drawn())


def test_one_graph_serves_any_number_of_keys(version_4):
    """Whether the parts divide it or not; and one more with gradient."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(split_kv_attention, backend=count, fullgraph=True, dynamic=False)
    for keys in (8, 9, 12, 15, 20):
        q, k, v = drawn(keys=keys)
        for tensor in (k, v):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        with torch.no_grad():
            torch.testing.assert_close(call(q, k, v), attention(q, k, v, backend="math"))
        assert len(graphs) == 1
    call(*(x.requires_grad_() for x in drawn()))
    assert len(graphs) == 2
