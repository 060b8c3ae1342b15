"""SiD against a derivation by hand on linear score models."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftk.objectives import sid_loss

FRAMES, CHANNELS = 3, 2


def linear(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    n = FRAMES * CHANNELS
    return torch.randn(n, n, generator=generator, dtype=torch.float64), torch.randn(n, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), sigma=st.floats(0.02, 0.98), alpha=st.floats(-0.5, 1.5), normalize=st.booleans())
def test_gradient_equals_the_derivation_on_linear_scores(seed, sigma, alpha, normalize):
    """With `real = R y + r`, `fake = F y + f` and `y = (1 - s) x + s e`, the gradient of the sum is, per sample,

    `[(1 - s) (R - F)^T (r - x - 2 a d) + ((1 - s) R - 1)^T d] / N` with `d = real - fake` and `N` the normaliser.
    """
    generator = torch.Generator().manual_seed(seed)
    (real_matrix, real_bias), (fake_matrix, fake_bias) = linear(generator), linear(generator)
    x, noise = (torch.randn(2, FRAMES, CHANNELS, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()

    def score(matrix, bias):
        noisy = ((1 - sigma) * x + sigma * noise).flatten(1)
        return (noisy @ matrix.T + bias).reshape(x.shape)

    loss, weight = sid_loss(x, score(fake_matrix, fake_bias), score(real_matrix, real_bias), alpha=alpha, normalize=normalize)
    (found,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        flat, level = x.flatten(1), 1 - sigma
        noisy = level * flat + sigma * noise.flatten(1)
        real, fake = noisy @ real_matrix.T + real_bias, noisy @ fake_matrix.T + fake_bias
        d = real - fake
        by_difference = level * (real - flat - 2 * alpha * d) @ (real_matrix - fake_matrix)
        by_residual = level * d @ real_matrix - d
        size = (flat - real).abs().mean(dim=1, keepdim=True) if normalize else 1.0
        expected = ((by_difference + by_residual) / size).reshape(x.shape)
    assert weight == x.numel()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_scores_that_agree_leave_no_gradient():
    x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    same = 0.5 * x + 1
    loss, _ = sid_loss(x, same, same.clone())
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0].abs().max() == 0


def test_masked_frames_do_not_count():
    x, fake, real = (torch.randn(1, 4, 2, 2, 2) for _ in range(3))
    mask = torch.tensor([[False, True, True, False]])
    loss, weight = sid_loss(x, fake, real, mask, normalize=False)
    alone, count = sid_loss(x[:, 1:3], fake[:, 1:3], real[:, 1:3], normalize=False)
    assert weight == count
    torch.testing.assert_close(loss, alone)


def test_a_vanishing_normaliser_is_guarded_or_becomes_zero():
    x = torch.ones(1, 1, 1, 1, 1)
    guarded, _ = sid_loss(x, 2 * x, x.clone())
    unguarded, _ = sid_loss(x, 2 * x, x.clone(), guard=False)
    assert guarded.isfinite()
    assert unguarded.isfinite()
