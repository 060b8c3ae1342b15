"""Adversarial losses at known logits."""

import math

import pytest
import torch

from sftk.errors import ShapeError
from sftk.objectives import gan_discriminator_loss, gan_generator_loss


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_plain_losses():
    fake, real = torch.tensor([[0.5], [-1.0]]), torch.tensor([[2.0], [0.0]])
    loss, weight = gan_generator_loss(fake)
    assert (loss / weight).item() == pytest.approx((softplus(-0.5) + softplus(1.0)) / 2, rel=1e-6)
    loss, weight = gan_discriminator_loss(fake, real)
    expected = (softplus(-2.0) + softplus(0.0)) / 2 + (softplus(0.5) + softplus(-1.0)) / 2
    assert (loss / weight).item() == pytest.approx(expected, rel=1e-6)


def test_relativistic_losses_are_each_others_mirror():
    fake, real = torch.randn(5, 3), torch.randn(5, 3)
    generator = gan_generator_loss(fake, real, relativistic=True)
    discriminator = gan_discriminator_loss(real, fake, relativistic=True)
    torch.testing.assert_close(generator, discriminator)
    shifted = gan_generator_loss(fake + 7, real + 7, relativistic=True)
    torch.testing.assert_close(shifted[0], generator[0], rtol=1e-5, atol=1e-5)


def test_relativistic_needs_real_logits():
    with pytest.raises(ShapeError, match="bind real_logits"):
        gan_generator_loss(torch.zeros(1, 1), relativistic=True)


def test_large_logits_stay_finite_in_half_precision():
    loss, _ = gan_discriminator_loss(torch.full((2, 1), 3e4, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_logits_are_compared_one_to_one():
    fake, real = torch.zeros(4, 1), torch.zeros(1, 1)
    for call in (
        lambda: gan_discriminator_loss(fake, real),
        lambda: gan_discriminator_loss(fake, real, relativistic=True),
        lambda: gan_generator_loss(fake, real, relativistic=True),
    ):
        with pytest.raises(ShapeError, match=r"found \[4, 1\] and \[1, 1\]"):
            call()
