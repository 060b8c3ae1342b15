from __future__ import annotations

import pytest
import torch

from sftk.core import Graph
from sftk.errors import ShapeError, SpecError
from sftk.functional import KVCache, flow_to_x0, predict_flow, predict_flow_teacher_forced, predict_x0, predict_x0_cfg
from sftk.functional.classify import ToyDiscriminator, classify
from sftk.functional.guided import guided_kv
from sftk.functional.predict import toy_denoiser
from sftk.functional.schedule import timestep_to_sigma


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture
def inputs(randn):
    return randn(2, 4, 4, 4, 4), torch.rand(2, 4, dtype=torch.float64) * 1000, randn(2, 4, 8), randn(2, 4, 8)


@pytest.mark.parametrize(("schedule", "shift"), [("continuous", 5.0), ("table", 5.0), ("table", 8.0)])
def test_x0_is_read_with_the_sigma_of_its_schedule(model, inputs, schedule, shift):
    noisy, timestep, prompt, _ = inputs
    x0 = predict_x0(model, noisy, timestep, prompt, schedule=schedule, shift=shift)
    flow = predict_flow(model, noisy, timestep, prompt)
    torch.testing.assert_close(x0, flow_to_x0(noisy, flow, timestep_to_sigma(timestep, schedule, shift)))


@pytest.mark.parametrize("batched", [False, True])
def test_cfg_guides_x0(model, inputs, batched):
    noisy, timestep, prompt, negative = inputs
    cond, uncond = predict_x0(model, noisy, timestep, prompt), predict_x0(model, noisy, timestep, negative)
    found = predict_x0_cfg(model, noisy, timestep, prompt, negative, scale=4.0, batched=batched)
    torch.testing.assert_close(found, uncond + 4.0 * (cond - uncond), rtol=1e-10, atol=1e-10)
    assert torch.equal(predict_x0_cfg(model, noisy, timestep, prompt, negative, scale=1.0, batched=batched), cond)


def test_block_causal_flow_of_early_frames_knows_no_later_ones(model, inputs, randn):
    noisy, timestep, prompt, _ = inputs
    other = torch.cat([noisy[:, :2], randn(2, 2, 4, 4, 4)], 1)
    causal = [predict_flow(model, x, timestep, prompt, frames_per_block=2) for x in (noisy, other)]
    assert torch.equal(causal[0][:, :2], causal[1][:, :2])
    assert not torch.equal(causal[0][:, 2:], causal[1][:, 2:])
    both = [predict_flow(model, x, timestep, prompt) for x in (noisy, other)]
    assert not torch.allclose(both[0][:, :2], both[1][:, :2])


def test_teacher_forced_flow_reads_clean_frames_of_earlier_blocks_alone(model, inputs, randn):
    noisy, timestep, prompt, _ = inputs
    clean = randn(2, 4, 4, 4, 4)

    def flow(latents, x=noisy):
        return predict_flow_teacher_forced(model, x, timestep, latents, prompt, frames_per_block=2)

    base = flow(clean)
    changed = torch.cat([clean[:, :2], randn(2, 2, 4, 4, 4)], 1)
    assert torch.equal(flow(changed), base)
    changed = torch.cat([randn(2, 2, 4, 4, 4), clean[:, 2:]], 1)
    assert torch.equal(flow(changed)[:, :2], base[:, :2])
    assert not torch.allclose(flow(changed)[:, 2:], base[:, 2:])
    renoised = torch.cat([randn(2, 2, 4, 4, 4), noisy[:, 2:]], 1)
    torch.testing.assert_close(flow(clean, renoised)[:, 2:], base[:, 2:], rtol=1e-12, atol=1e-12)


def test_teacher_forcing_tells_the_network_the_clean_timestep(model, inputs, randn):
    noisy, timestep, prompt, _ = inputs
    clean = randn(2, 4, 4, 4, 4)
    plain = predict_flow_teacher_forced(model, noisy, timestep, clean, prompt, frames_per_block=2)
    zero = predict_flow_teacher_forced(model, noisy, timestep, clean, prompt, torch.zeros(2, 4), frames_per_block=2)
    some = predict_flow_teacher_forced(model, noisy, timestep, clean, prompt, torch.full((2, 4), 50.0), frames_per_block=2)
    assert torch.equal(plain, zero)
    assert not torch.allclose(plain, some)
    with pytest.raises(ShapeError, match="must have the same shape"):
        predict_flow_teacher_forced(model, noisy, timestep, clean[:, :2], prompt, frames_per_block=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "a pass over all frames at once has no blocks, found window 4; set frames_per_block"),
        ({"sink": 1}, "found sink 1; set frames_per_block"),
        ({"independent_first_frame": True}, "found independent_first_frame True; set frames_per_block"),
        ({"frames_per_block": 3, "window": 3, "sink": 1}, "a window of 3 frames cannot hold a block of 3 and 1 sink frames"),
    ],
)
@pytest.mark.parametrize("op", [predict_flow, predict_x0])
def test_options_of_a_causal_pass_need_blocks(op, options, message):
    with pytest.raises(SpecError, match=message):
        Graph([op.node(**options)], inputs=("noisy", "timestep", "prompt_embeds"))


def test_guided_context_needs_both_conditions(inputs):
    noisy, timestep, prompt, _ = inputs
    with pytest.raises(ShapeError, match=r"guidance of scale 2\.0 needs negative_embeds"):
        guided_kv(toy_denoiser, noisy, timestep, prompt, None, scale=2.0, cache=KVCache())


def test_teacher_forced_flow_is_guided(model, inputs, randn):
    noisy, timestep, prompt, negative = inputs
    clean = randn(2, 4, 4, 4, 4)

    def flow(embeds, **more):
        return predict_flow_teacher_forced(model, noisy, timestep, clean, embeds, frames_per_block=2, **more)

    cond, uncond = flow(prompt), flow(negative)
    found = flow(prompt, negative_embeds=negative, scale=3.0)
    torch.testing.assert_close(found, uncond + 3 * (cond - uncond), rtol=1e-10, atol=1e-10)
    assert torch.equal(flow(prompt, negative_embeds=negative), cond)
    assert not torch.allclose(cond, uncond)
    with pytest.raises(ShapeError, match=r"guidance of scale 3\.0 needs negative_embeds"):
        flow(prompt, scale=3.0)


@pytest.mark.parametrize(("window", "sink", "seen"), [(None, 0, {0, 1, 2, 3}), (1, 0, {3}), (2, 1, {0, 3}), (3, 1, {0, 2, 3})])
def test_windows_and_sinks_of_a_causal_pass(inputs, window, sink, seen):
    noisy, timestep, prompt, _ = inputs
    layouts = []

    def spy(*args, layout, **kwargs):
        layouts.append(layout)
        return toy_denoiser(*args, layout=layout, **kwargs)

    predict_flow(spy, noisy, timestep, prompt, frames_per_block=1, window=window, sink=sink)
    predict_x0(spy, noisy, timestep, prompt, frames_per_block=1, window=window, sink=sink)
    for layout in layouts:
        assert {frame for frame, sees in enumerate(layout.frame_mask()[-1].tolist()) if sees} == seen


def test_a_discriminator_is_told_the_timestep(inputs):
    noisy, timestep, prompt, _ = (x.float() for x in inputs)
    low = classify(toy_denoiser, ToyDiscriminator(), noisy, timestep, prompt)
    features = toy_denoiser(noisy, timestep, prompt)[0].flatten(1).square().mean(dim=1, keepdim=True)
    torch.testing.assert_close(low, features + timestep.mean(dim=1, keepdim=True) / 1000)


def test_a_discriminator_gets_the_hidden_states_that_it_names(model, inputs):
    class Last:
        features_at = (-1, 0)

        def __call__(self, features, timestep):
            return torch.stack([x.flatten(1).sum(dim=1) for x in features], dim=1)

    noisy, timestep, prompt, _ = inputs
    states = model(noisy, timestep, prompt, features_at=(0, 1))[2]
    expected = torch.stack([states[i].flatten(1).sum(dim=1) for i in (1, 0)], dim=1)
    torch.testing.assert_close(classify(model, Last(), noisy, timestep, prompt), expected)
    assert not torch.allclose(expected[:, 0], expected[:, 1])
