from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch.distributions import Normal

from sftk.objectives import divergence_weight, dmd_gradient, f_divergence, mean_log_ratio, surrogate_loss, weigh_samples
from sftk.objectives.divergence import Divergence

every = pytest.mark.parametrize("divergence", get_args(Divergence))


@every
def test_the_weight_is_the_second_derivative_times_the_squared_ratio(divergence):
    r = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f_divergence(r, divergence).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(divergence_weight(r.log(), divergence), curvature * r**2, rtol=1e-9, atol=1e-12)
    step = 1e-4 * r.detach()  # and without autograd
    ahead, here, behind = (f_divergence(r.detach() + s * step, divergence) for s in (1, 0, -1))
    torch.testing.assert_close((ahead - 2 * here + behind) / step**2, curvature, rtol=1e-4, atol=1e-6)


@every
def test_f_is_convex_and_vanishes_at_equal_densities(divergence):
    assert f_divergence(torch.ones(1, dtype=torch.float64), divergence).abs() < 1e-15
    assert (divergence_weight(torch.linspace(-5, 5, 11), divergence) > 0).all()


@every
def test_it_weighs_the_score_difference_into_the_gradient_of_the_divergence(divergence):
    """Two Gaussians: the derivative of D_f(p || q) by q's mean, by quadrature and as -E_q[h (score_p - score_q)]."""
    x = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    teacher, mean = Normal(x.new_tensor(0.0), x.new_tensor(1.0)), x.new_tensor(0.7, requires_grad=True)

    def integral(values):
        return torch.trapezoid(values, x)

    def divergence_at(mean):
        student = Normal(mean, x.new_tensor(1.0))
        log_ratio = teacher.log_prob(x) - student.log_prob(x)
        return integral(student.log_prob(x).exp() * f_divergence(log_ratio.exp(), divergence))

    (direct,) = torch.autograd.grad(divergence_at(mean), mean)
    m = mean.detach()
    density = Normal(m, x.new_tensor(1.0)).log_prob(x).exp()
    log_ratio = (m**2 / 2 - m * x).to(torch.float64)
    difference = -x - (-(x - m))  # scores of N(0, 1) and N(m, 1)
    weighed = -integral(density * divergence_weight(log_ratio, divergence) * difference)
    torch.testing.assert_close(direct, weighed, rtol=1e-6, atol=1e-9)


def test_reverse_kl_is_plain_dmd(randn):
    x0, grad = randn(3, 4, 2).requires_grad_(), randn(3, 4, 2)
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 3 + [True]])
    weight = weigh_samples(randn(3), mask, divergence="reverse_kl")
    for a, b in zip(surrogate_loss(x0, grad, weight), surrogate_loss(x0, grad, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_weights_have_a_mean_of_one_over_the_global_batch(randn):
    """Sum over weight is h grad / mean h, however the batch is split."""
    x0, fake, real, logits = randn(4, 3, 2), randn(4, 3, 2), randn(4, 3, 2), randn(4)
    x0.requires_grad_()
    grad = dmd_gradient(x0, fake, real)
    h = divergence_weight(logits, "jeffreys")
    expected = (h / h.mean())[:, None, None] * grad / x0.numel()
    for parts in ([[0, 1, 2, 3]], [[0], [1, 2, 3]]):
        losses = [
            surrogate_loss(x0[i], grad[i], weigh_samples(logits[i], torch.ones(len(i), 3).bool(), divergence="jeffreys"))
            for i in parts
        ]
        loss, weight = (sum(column) for column in zip(*losses, strict=True))
        (found,) = torch.autograd.grad(loss / weight, x0)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_ratio_is_the_mean_logit_clamped_and_without_gradient(randn):
    logits = torch.tensor([[1.0, 3.0], [90.0, 92.0], [-8.0, -6.0]], requires_grad=True)
    found = weigh_samples(logits, divergence="forward_kl", clamp=(-5.0, 4.0))
    torch.testing.assert_close(found[:, 0], torch.tensor([2.0, 4.0, -5.0]).exp())
    assert not found.requires_grad
    assert weigh_samples(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_mean_ratio_of_a_batch_becomes_one(randn):
    logits = randn(64) + 3
    centred = weigh_samples(logits, log_ratio_mean=mean_log_ratio(logits), divergence="forward_kl", clamp=(-50, 50))
    torch.testing.assert_close(centred.mean(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)
    assert mean_log_ratio(torch.full((5, 3), 2.0)).item() == pytest.approx(2.0)
    assert math.isclose(mean_log_ratio(torch.zeros(7)).item(), 0.0, abs_tol=1e-6)
