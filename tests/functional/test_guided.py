"""Guidance block by block: one batch or two passes, one cache or two, no guidance at scale 1; few steps of whole clips."""

from __future__ import annotations

import pytest
import torch

from sftk.core import Graph
from sftk.functional import FrameNoise, Key
from sftk.functional.cache import KVCache, append, take_rows

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def clip(randn, frames: int = 6):
    embeds = {name: randn(2, 4, 8) for name in ("prompt_embeds", "negative_embeds")}
    return {"noise": randn(2, frames, 4, 4, 4), "key": Key(seed=0, samples=(0, 1)), **embeds}


@torch.no_grad()
def causal(state, denoiser, **params):
    params = {"steps": 3, "shift": 3.0, "rope": "relative", "frames_per_block": 2, "window": 5, "sink": 1} | params
    return Graph.from_spec("specs/sample_causal.yaml", **params)(state, {"denoiser": denoiser})["x0"]


@pytest.mark.parametrize("context_noise", [0.0, 50.0])
@pytest.mark.parametrize("given", [0, 2])
def test_one_batch_equals_two_passes(make_model, randn, given, context_noise):
    model, state = make_model(), clip(randn)
    if given:
        state["initial_latents"] = randn(2, given, 4, 4, 4)
    found = [
        causal(state, model, guidance=2.5, guidance_batch=batched, context_noise=context_noise) for batched in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_scale_1_is_no_guidance_and_takes_no_second_pass(make_model, randn):
    model, state, calls = make_model(), clip(randn), []

    def spy(latents, *arguments, **options):
        calls.append(latents.shape[0])
        return model(latents, *arguments, **options)

    found = causal(state, spy, guidance=1.0)
    assert calls == [2] * (3 * 3 + 2)
    other = causal(state | {"negative_embeds": randn(2, 4, 8)}, model, guidance=1.0, guidance_batch=True)
    assert torch.equal(found, other)
    near = causal(state, model, guidance=1.0 + 1e-9)
    torch.testing.assert_close(near, found, rtol=1e-6, atol=1e-7)


def test_samples_do_not_see_one_another(make_model, randn):
    model, state = make_model(), clip(randn)
    both = causal(state, model, guidance=2.5, guidance_batch=True)
    for index in (0, 1):
        one = {name: value[index : index + 1] for name, value in state.items() if name != "key"}
        alone = causal(one | {"key": Key(seed=0, samples=(index,))}, model, guidance=2.5)
        torch.testing.assert_close(alone, both[index : index + 1], **CLOSE)


def test_rows_of_a_cache_are_views(randn):
    kv = tuple(tuple(randn(4, 6, 1, 2) for _ in range(4)) for _ in range(2))
    cache = append(KVCache(), kv, (0, 1))
    rows = take_rows(cache, 1, 3)
    assert rows.positions == (0, 1)
    found = rows.layer(1)
    assert found is not None
    assert torch.equal(found[0], kv[1][0][1:3])
    assert found[0].untyped_storage().data_ptr() == kv[1][0].untyped_storage().data_ptr()
    assert rows.text is not None
    assert torch.equal(rows.text[0][1], kv[0][3][1:3])


def test_few_steps_of_whole_clips_are_a_rollout_of_one_block(make_model, randn):
    model, state = make_model(), clip(randn)
    params = {"steps": (1000, 750, 250), "shift": 5.0}
    few = Graph.from_spec("specs/sample_few_step.yaml", **params)
    rollout = Graph.from_spec("specs/rollout.yaml", frames_per_block=6, last_step_only=True, **params)
    with torch.no_grad():
        found, expected = (graph(state, {"denoiser": model})["x0"] for graph in (few, rollout))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_noise_that_is_drawn_when_it_is_taken(make_model, randn):
    model, state = make_model(torch.float32), {k: v.float() if k != "key" else v for k, v in clip(randn).items()}
    noise = FrameNoise(state["key"], (4, 4, 4), 6)
    lazy, whole = (causal(state | {"noise": given}, model, guidance=2.0) for given in (noise, noise.whole()))
    assert torch.equal(lazy, whole)
    assert noise.whole().std().item() == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(noise[:, 0:1], noise[:, 1:2])
