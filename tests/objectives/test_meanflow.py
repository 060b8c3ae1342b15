from __future__ import annotations

import pytest
import torch

from sftk.core.graph import Graph
from sftk.functional import flow_tangent, predict_flow
from sftk.functional.predict import toy_denoiser
from sftk.objectives import adaptive_loss, consistency_target, flow_matching_loss, mean_flow_target, mix_velocity

SPREAD = 0.6
"""Standard deviation of the data of an analytic flow: x0 ~ N(0, SPREAD^2), noise ~ N(0, 1)."""


def deviation(sigma):
    """Of x_sigma."""
    return (((1 - sigma) * SPREAD) ** 2 + sigma**2).sqrt()


def wide(sigma):
    return sigma[:, :, None, None, None]


def velocity(x, timestep):
    """The flow of that data, E[noise - x0 | x]: x over the variance, times sigma - (1 - sigma) SPREAD^2."""
    sigma = timestep / 1000
    return x * wide((sigma - (1 - sigma) * SPREAD**2) / deviation(sigma) ** 2)


def average(latents, timestep, prompt_embeds, *, interval, layout=None):
    """Its average over an interval: the flow only scales x, by the ratio of the deviations."""
    start, end = timestep / 1000, (timestep - interval) / 1000
    length = (interval / 1000).clamp(min=1e-9)
    return latents * wide((1 - deviation(end) / deviation(start)) / length), (), ()


def consistent(latents, timestep, prompt_embeds, *, layout=None):
    """The flow with which `x - sigma F` is the end of x's path, whatever sigma."""
    sigma = timestep / 1000
    return latents * wide((1 - SPREAD / deviation(sigma)) / sigma), (), ()


def biased(model, share):
    """A wrong model: its prediction scaled, the more the later."""

    def call(latents, timestep, *args, **kwargs):
        flow, kv, features = model(latents, timestep, *args, **kwargs)
        return flow * wide(1 + share * timestep / 1000), kv, features

    return call


@pytest.fixture
def point(randn):
    timestep = 200 + 700 * randn(3, 1).sigmoid().expand(-1, 2)
    interval = timestep * randn(3, 1).sigmoid().expand(-1, 2)
    return randn(3, 2, 4, 2, 2), timestep, interval, randn(3, 2, 8)


def test_the_true_average_velocity_has_no_loss_and_a_wrong_one_has(point):
    noisy, timestep, interval, embeds = point

    def loss(model):
        flow = predict_flow(model, noisy, timestep, embeds, interval)
        target = mean_flow_target(model, noisy, timestep, interval, velocity(noisy, timestep), embeds)
        total, weight = flow_matching_loss(flow, target)
        return total / weight

    assert loss(average) < 1e-24
    assert loss(biased(average, 0.2)) > 1e-3

    def instantaneous(latents, timestep, prompt_embeds, *, interval, layout=None):
        return velocity(latents, timestep), (), ()

    assert loss(instantaneous) > 1e-4


def test_an_empty_interval_is_flow_matching(point):
    noisy, timestep, interval, embeds = point
    flow = velocity(noisy, timestep)
    assert torch.equal(mean_flow_target(average, noisy, timestep, 0 * interval, flow, embeds), flow)


def test_the_true_consistency_function_is_its_own_target_and_a_wrong_one_is_not(point):
    noisy, timestep, _, embeds = point
    flow = velocity(noisy, timestep)
    for normalize in (False, True):
        found = consistency_target(consistent, noisy, timestep, flow, embeds, normalize=normalize)
        torch.testing.assert_close(found, consistent(noisy, timestep, embeds)[0], rtol=1e-9, atol=1e-9)
        wrong = biased(consistent, 0.2)
        moved = (
            consistency_target(wrong, noisy, timestep, flow, embeds, normalize=normalize) - wrong(noisy, timestep, embeds)[0]
        )
        assert moved.abs().mean() > 1e-2


def test_the_consistency_tangent_is_that_of_x0_by_finite_differences(point):
    """`target - F` is the derivative of f(x, s) = x - s F(x, s) along the path, for any model."""
    noisy, timestep, _, embeds = point
    along, step = noisy.flip(0), 1e-3

    def x0(t):
        x = noisy + (t - timestep)[:, :, None, None, None] / 1000 * along
        return x - wide(t / 1000) * toy_denoiser(x, t, embeds)[0]

    found = consistency_target(toy_denoiser, noisy, timestep, along, embeds, normalize=False)
    expected = (x0(timestep + step) - x0(timestep - step)) / (2 * step / 1000)
    torch.testing.assert_close(found - toy_denoiser(noisy, timestep, embeds)[0], expected, rtol=1e-6, atol=1e-8)


def test_the_ramp_goes_from_flow_matching_to_consistency(point):
    noisy, timestep, _, embeds = point
    along = noisy.flip(0)
    start, half, end = (
        consistency_target(toy_denoiser, noisy, timestep, along, embeds, ramp, normalize=False) for ramp in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(start, along)
    torch.testing.assert_close(half, (start + end) / 2)


def test_normalised_tangents_have_a_size_near_one(point):
    noisy, timestep, _, embeds = point
    along = 1e4 * noisy.flip(0)
    flow = toy_denoiser(noisy, timestep, embeds)[0]
    step = consistency_target(toy_denoiser, noisy, timestep, along, embeds, guard=0.1) - flow
    torch.testing.assert_close(
        step.square().mean(dim=(1, 2, 3, 4)).sqrt(), torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("with_interval", [False, True])
def test_tangents_of_the_backbone_equal_finite_differences(make_model, randn, with_interval):
    model = make_model(interval_embedding=True, backend="sdpa").requires_grad_(False)
    x, embeds, along = randn(2, 3, 4, 4, 4), randn(2, 4, 8), randn(2, 3, 4, 4, 4)
    timestep = 300 + 600 * randn(2, 3).sigmoid()
    interval = 200 * randn(2, 3).sigmoid() if with_interval else None
    flow, tangent = flow_tangent(model, x, timestep, embeds, along, interval)

    def at(step):
        more = {} if interval is None else {"interval": interval + 1000 * step}
        return model(x + step * along, timestep + 1000 * step, embeds, **more)[0]

    torch.testing.assert_close(flow, at(0.0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tangent, (at(1e-7) - at(-1e-7)) / 2e-7, rtol=1e-5, atol=1e-6)
    assert tangent.abs().mean() > 1e-2


def test_a_target_carries_no_gradient_and_the_prediction_does(make_model, randn):
    model = make_model(interval_embedding=True)
    x, embeds = randn(1, 3, 4, 4, 4), randn(1, 4, 8)
    timestep, interval = torch.full((1, 3), 600.0), torch.full((1, 3), 200.0)
    target = mean_flow_target(model, x, timestep, interval, x.clone().requires_grad_(), embeds)
    assert not target.requires_grad
    assert not consistency_target(model, x, timestep, x, embeds).requires_grad
    total, _ = adaptive_loss(predict_flow(model, x, timestep, embeds, interval), target)
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mixed_velocities(point):
    noisy, timestep, _, embeds = point
    data, negative = noisy.flip(0), embeds.flip(0)
    with_prompt, without = (toy_denoiser(noisy, timestep, e)[0] for e in (embeds, negative))
    calls = []

    def counted(*args):
        calls.append(args)
        return toy_denoiser(*args)

    def mixed(**options):
        return mix_velocity(counted, noisy, timestep, data, embeds, negative, **options)

    assert torch.equal(mixed(), data)
    assert not calls
    torch.testing.assert_close(mixed(from_data=0.0, from_model=1.0), with_prompt)
    assert len(calls) == 1
    torch.testing.assert_close(mixed(from_data=0.0, from_model=2.5), without + 2.5 * (with_prompt - without))
    torch.testing.assert_close(mixed(from_data=1.5), 1.5 * data - 0.5 * without)
    # MeanFlow's omega and kappa with a perfect model: a guidance of omega / (1 - kappa).
    perfect = mix_velocity(toy_denoiser, noisy, timestep, with_prompt, embeds, negative, from_data=1.0, from_model=0.5)
    torch.testing.assert_close(perfect, 1.5 * with_prompt - 0.5 * without)


def test_adaptive_loss_against_its_formula(randn):
    flow, target = randn(3, 2, 4).requires_grad_(), randn(3, 2, 4)
    error = (flow - target).detach()
    each = error.square().mean(dim=(1, 2), keepdim=True)
    for power in (0.0, 0.5, 1.0):
        total, weight = adaptive_loss(flow, target, power=power, guard=1e-3)
        assert weight == 24
        torch.testing.assert_close(total.detach(), (error.square() / (each + 1e-3) ** power).sum())
        (grad,) = torch.autograd.grad(total, flow)
        torch.testing.assert_close(grad, 2 * error / (each + 1e-3) ** power)


def test_the_specs_have_the_objective_of_these_functions(make_model, randn):
    """specs/meanflow.yaml from start to end, with everything that is drawn known."""
    from sftk.functional import Key, draw_interval

    model, teacher = make_model(interval_embedding=True, seed=1), make_model(seed=2)
    latents, embeds, negative = randn(2, 3, 4, 4, 4), randn(2, 4, 8), randn(2, 4, 8)
    key = Key(seed=5, phase="p", update=7, samples=(0, 1))
    graph = Graph.from_spec("specs/meanflow.yaml", shift=3.0, empty=0.0, guidance=2.0, drop=0.0)
    state = {"latents": latents, "prompt_embeds": embeds, "negative_embeds": negative, "key": key}
    found = graph(state, {"denoiser": model, "teacher": teacher})
    timestep, interval = draw_interval(key, latents, shift=3.0, empty=0.0)
    noise = key.normal("noise", latents.shape[1:], dtype=torch.float64)
    noisy = latents + wide(timestep / 1000).double() * (noise - latents)
    with torch.no_grad():
        guided = 2.0 * teacher(noisy, timestep, embeds)[0] - teacher(noisy, timestep, negative)[0]
    target = mean_flow_target(model, noisy, timestep, interval, guided, embeds)
    expected, weight = adaptive_loss(model(noisy, timestep, embeds, interval=interval)[0], target)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-6, atol=0)
    assert found["loss_weight"] == weight
