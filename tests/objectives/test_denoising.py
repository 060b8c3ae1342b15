from __future__ import annotations

import pytest
import torch

from sftk.functional import add_noise, flow_to_noise, interpolate, timestep_to_sigma, x0_to_flow
from sftk.objectives import denoising_error, denoising_loss, flow_matching_loss, squared_error

SHAPE = (2, 3, 4, 2, 2)


@pytest.fixture
def sample(randn):
    x0, noise = randn(*SHAPE), randn(*SHAPE)
    timestep = 20 + 960 * torch.rand(2, 3, dtype=torch.float64)
    return {"x0": x0, "noise": noise, "noisy": add_noise(x0, noise, timestep), "timestep": timestep}


def formula(prediction: str, x0, noise, noisy, x0_pred, sigma):
    s = sigma[..., None, None, None]
    if prediction == "x0":
        return (x0_pred - x0) ** 2
    if prediction == "flow":
        return ((noisy - x0_pred) / s - (noise - x0)) ** 2
    if prediction == "noise":
        return ((noisy - (1 - s) * x0_pred) / s - noise) ** 2
    alpha_bar = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
    return (x0_pred - x0) ** 2 / (1 - alpha_bar)


@pytest.mark.parametrize("prediction", ["flow", "x0", "v", "noise"])
@pytest.mark.parametrize(("schedule", "shift"), [("continuous", 1.0), ("table", 5.0)])
def test_four_losses_against_their_formulas(randn, sample, prediction, schedule, shift):
    if schedule == "table":
        sample["noisy"] = add_noise(sample["x0"], sample["noise"], sample["timestep"], schedule=schedule, shift=shift)
    x0_pred = randn(*SHAPE)
    loss, weight = denoising_loss(**sample, x0_pred=x0_pred, prediction=prediction, schedule=schedule, shift=shift)
    sigma = timestep_to_sigma(sample["timestep"], schedule, shift)
    expected = formula(prediction, sample["x0"], sample["noise"], sample["noisy"], x0_pred, sigma)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-11, atol=0)
    assert weight == expected.numel()
    # All four are the x0 error with another weight.
    factor = expected / (x0_pred - sample["x0"]) ** 2
    spread = factor.flatten(2)
    torch.testing.assert_close(spread, spread[..., :1].expand_as(spread), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["flow", "x0", "v", "noise"])
def test_a_perfect_critic_has_no_loss(sample, prediction):
    loss, _ = denoising_loss(**sample, x0_pred=sample["x0"], prediction=prediction)
    assert loss < 1e-18


@pytest.mark.parametrize("prediction", ["flow", "x0", "v", "noise"])
def test_gradients_are_right(randn, prediction):
    x0, noise = randn(1, 2, 1, 2, 1), randn(1, 2, 1, 2, 1)
    timestep = torch.tensor([[300.0, 800.0]], dtype=torch.float64)
    noisy = add_noise(x0, noise, timestep)

    def loss(x0_pred):
        return denoising_loss(x0, noise, noisy, timestep, x0_pred, prediction=prediction)[0]

    assert torch.autograd.gradcheck(loss, randn(1, 2, 1, 2, 1).requires_grad_())


def test_no_gradient_reaches_the_samples(randn, sample):
    """The critic learns; the student that made the samples does not."""
    sample["x0"].requires_grad_()
    sample["noisy"] = interpolate(sample["x0"], sample["noise"], sample["timestep"] / 1000)
    x0_pred = randn(*SHAPE).requires_grad_()
    loss, _ = denoising_loss(**sample, x0_pred=x0_pred)
    found = torch.autograd.grad(loss, [sample["x0"], x0_pred], allow_unused=True)
    assert found[0] is None
    assert found[1].abs().max() > 0


def test_error_of_given_predictions(randn, sample):
    x0, noise, noisy = sample["x0"], sample["noise"], sample["noisy"]
    sigma = sample["timestep"] / 1000
    flow_pred = randn(*SHAPE)
    noise_pred = flow_to_noise(noisy, flow_pred, sigma)
    assert (
        denoising_error(x0, noise, x0, flow_pred, noise_pred, torch.tensor(0.5), "flow")[0]
        == squared_error(flow_pred, noise - x0)[0]
    )
    assert (
        denoising_error(x0, noise, x0, flow_pred, noise_pred, torch.tensor(0.5), "noise")[0]
        == squared_error(noise_pred, noise)[0]
    )
    torch.testing.assert_close(x0_to_flow(noisy, x0, sigma), noise - x0, rtol=1e-9, atol=1e-9)


def test_squared_error_weights_do_not_enter_the_count(randn):
    a, b = randn(2, 3), randn(2, 3)
    weight = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    total, count = squared_error(a, b, weight)
    torch.testing.assert_close(total, 2 * ((a - b)[0] ** 2).sum())
    assert count == 6
    assert (total.dtype, count.dtype) == (torch.float64, torch.float64)


def test_flow_matching_loss_counts_masked_elements(randn):
    flow, target = randn(*SHAPE), randn(*SHAPE)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    loss, weight = flow_matching_loss(flow, target, mask)
    torch.testing.assert_close(loss, ((flow - target) ** 2)[mask].sum())
    assert weight == 3 * 16
    torch.testing.assert_close(flow_matching_loss(flow, target)[0], ((flow - target) ** 2).sum())
    assert torch.autograd.gradcheck(lambda x: flow_matching_loss(x, target, mask)[0], flow.requires_grad_())


def test_losses_of_half_precision_are_computed_in_float32(randn):
    flow, target = randn(*SHAPE).bfloat16(), randn(*SHAPE).bfloat16()
    loss, _ = flow_matching_loss(flow, target)
    assert loss.dtype == torch.float32
    assert loss == ((flow.float() - target.float()) ** 2).sum()
