from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftk.objectives import dmd_gradient, mean_magnitude, per_sample_normalizer, surrogate_loss
from sftk.objectives.dmd import element_mask

SHAPE = (3, 2, 4, 2, 2)


def triple(randn):
    return randn(*SHAPE), randn(*SHAPE), randn(*SHAPE)


def test_gradient_against_the_formula_in_numpy(randn):
    x0, fake, real = triple(randn)
    expected = torch.empty(SHAPE, dtype=torch.float64)
    for i in range(SHAPE[0]):
        size = abs(x0[i].numpy() - real[i].numpy()).mean()
        expected[i] = (fake[i] - real[i]) / size
    torch.testing.assert_close(dmd_gradient(x0, fake, real), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(dmd_gradient(x0, fake, real, normalize=False), fake - real, rtol=0, atol=0)
    single = dmd_gradient(*(x.float() for x in (x0, fake, real)))
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradient_carries_no_history(randn):
    x0, fake, real = (x.requires_grad_() for x in triple(randn))
    assert not dmd_gradient(x0, fake, real).requires_grad
    assert not per_sample_normalizer(x0, real).requires_grad


def test_normalizer_is_per_sample(randn):
    x0, fake, real = triple(randn)
    other = torch.cat([x0[:2], 100 * x0[2:]])
    a, b = dmd_gradient(x0, fake, real), dmd_gradient(other, fake, real)
    assert torch.equal(a[:2], b[:2])
    assert not torch.equal(a[2:], b[2:])
    assert per_sample_normalizer(x0, real).shape == (3, 1, 1, 1, 1)


def test_guard_keeps_a_vanishing_denominator_away(randn):
    x0, fake, _ = triple(randn)
    real = x0.clone()
    guarded = dmd_gradient(x0, fake, real)
    assert guarded.isfinite().all()
    floor = 1e-4 * real.abs().mean(dim=(1, 2, 3, 4), keepdim=True) + torch.finfo(torch.float64).eps
    torch.testing.assert_close(guarded, (fake - real) / floor)
    # As in the public code: without the guard 0/0 becomes 0 and x/0 the largest number.
    assert (dmd_gradient(x0, x0, real, guard=False) == 0).all()
    assert dmd_gradient(x0, fake, real, guard=False).abs().max() == torch.finfo(torch.float64).max
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    assert dmd_gradient(zero, fake, zero).isfinite().all()


def test_guard_does_nothing_where_there_is_no_danger(randn):
    inputs = triple(randn)
    assert torch.equal(dmd_gradient(*inputs), dmd_gradient(*inputs, guard=False))


@pytest.mark.parametrize("mask", ["none", "frames", "elements"])
def test_surrogate_gradient_is_grad_over_count(randn, mask):
    x0, grad = randn(*SHAPE).requires_grad_(), randn(*SHAPE)
    masks = {"none": None, "frames": randn(3, 2) > 0, "elements": randn(*SHAPE) > 0}
    loss, weight = surrogate_loss(x0, grad, masks[mask])
    seen = element_mask(masks[mask], grad)
    assert weight == seen.sum()
    (found,) = torch.autograd.grad(loss / weight, x0)
    torch.testing.assert_close(found, seen * grad / weight, rtol=1e-13, atol=0)
    # Its value is half the mean squared error to the target x0 - grad.
    target = (x0 - grad).detach()
    expected = 0.5 * ((x0 - target) ** 2)[seen.bool()].mean()
    torch.testing.assert_close(loss / weight, expected, rtol=1e-10, atol=0)


def test_surrogate_gradient_survives_large_latents(randn):
    """A literal float32 (x0 - (x0 - grad))^2 would lose every digit of a small gradient here."""
    x0 = (1e6 + randn(*SHAPE)).float().requires_grad_()
    grad = (1e-4 * randn(*SHAPE)).float()
    loss, weight = surrogate_loss(x0, grad)
    (found,) = torch.autograd.grad(loss / weight, x0)
    torch.testing.assert_close(found, grad / weight, rtol=1e-6, atol=0)


@given(cut=st.integers(1, 5), seed=st.integers(0, 100))
def test_masked_means_do_not_depend_on_the_split(cut, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, grad = torch.randn(2, 6, *SHAPE[1:], generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 2, generator=generator) > 0.5
    mask[0, 0] = True

    def reduced(parts):
        sums = [surrogate_loss(x0[p], grad[p], mask[p]) for p in parts]
        return sum(s for s, _ in sums) / sum(w for _, w in sums)

    whole, parts = reduced([slice(None)]), reduced([slice(0, cut), slice(cut, None)])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_losses_of_half_precision_are_float32(randn):
    x0, grad = randn(*SHAPE).bfloat16().requires_grad_(), randn(*SHAPE).bfloat16()
    loss, weight = surrogate_loss(x0, grad)
    assert (loss.dtype, weight.dtype) == (torch.float32, torch.float32)
    assert torch.autograd.grad(loss, x0)[0].dtype == torch.bfloat16
    assert dmd_gradient(x0, grad, -grad).dtype == torch.float32


def test_mean_magnitude():
    assert mean_magnitude(torch.tensor([1.0, -3.0])) == 2.0


def test_element_mask_broadcasts_from_the_left():
    like = torch.zeros(2, 3, 4)
    assert element_mask(torch.tensor([True, False]), like).sum(dim=(1, 2)).tolist() == [12.0, 0.0]
    assert element_mask(torch.tensor([[True, False, False]] * 2), like).sum(dim=(0, 2)).tolist() == [8.0, 0.0, 0.0]


def test_dmd_step_in_a_linear_world(randn):
    """With known scores the surrogate's gradient moves the student towards the teacher."""
    x0 = randn(*SHAPE).requires_grad_()
    real = torch.full(SHAPE, 2.0, dtype=torch.float64)
    grad = dmd_gradient(x0, x0, real)
    loss, weight = surrogate_loss(x0, grad)
    (step,) = torch.autograd.grad(loss / weight, x0)
    moved = x0 - 0.1 * weight * step
    assert ((moved - real).abs() < (x0 - real).abs()).all()
