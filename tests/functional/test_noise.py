from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftk.errors import ShapeError
from sftk.functional import (
    add_noise,
    alpha_bar,
    flow_target,
    flow_to_noise,
    flow_to_x0,
    guide,
    interpolate,
    noise_to_x0,
    x0_to_flow,
)
from sftk.functional.noise import expand_sigma


def draw(seed: int, per_frame: bool, low: float, high: float):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    sigma = torch.rand(2, 3, generator=generator, dtype=torch.float64) * (high - low) + low
    return x0, noise, sigma if per_frame else sigma[:, 0]


seeds = st.integers(0, 1000)


@given(seed=seeds, per_frame=st.booleans())
def test_conversions_invert(seed, per_frame):
    x0, noise, sigma = draw(seed, per_frame, 0.02, 0.98)
    noisy, flow = interpolate(x0, noise, sigma), flow_target(x0, noise)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(flow_to_x0(noisy, flow, sigma), x0, **close)
    torch.testing.assert_close(flow_to_noise(noisy, flow, sigma), noise, **close)
    torch.testing.assert_close(x0_to_flow(noisy, x0, sigma), flow, **close)
    torch.testing.assert_close(noise_to_x0(noisy, noise, sigma), x0, **close)
    torch.testing.assert_close(x0_to_flow(noisy, flow_to_x0(noisy, flow, sigma), sigma), flow, **close)


@given(seed=seeds, shift=st.floats(0.5, 10))
def test_add_noise_knows_no_shift_on_the_continuous_schedule(seed, shift):
    x0, noise, sigma = draw(seed, True, 0, 1)
    plain = add_noise(x0, noise, sigma * 1000)
    assert torch.equal(plain, add_noise(x0, noise, sigma * 1000, shift=shift))
    torch.testing.assert_close(plain, interpolate(x0, noise, sigma), rtol=1e-12, atol=1e-12)


def test_ends_are_exact():
    x0, noise, _ = draw(0, True, 0, 1)
    assert torch.equal(add_noise(x0, noise, torch.zeros(2, 3)), x0)
    assert torch.equal(add_noise(x0, noise, torch.full((2, 3), 1000.0)), noise)


@given(sigma=st.floats(0, 1))
def test_alpha_bar_keeps_the_signal_to_noise_ratio(sigma):
    found = alpha_bar(torch.tensor(sigma, dtype=torch.float64)).item()
    assert 0 <= found <= 1
    assert found * sigma**2 == pytest.approx((1 - found) * (1 - sigma) ** 2, abs=1e-12)


def test_expand_sigma_says_what_does_not_fit():
    with pytest.raises(ShapeError) as caught:
        expand_sigma(torch.zeros(2, 4), torch.zeros(2, 3, 4, 2, 2))
    assert str(caught.value) == "sigma of shape [2, 4] does not fit latents of shape [2, 3, 4, 2, 2]; expected [B] or [B, F]"
    with pytest.raises(ShapeError):
        expand_sigma(torch.zeros(2, 3, 1), torch.zeros(2, 3))


@given(seed=seeds, scale=st.floats(-2, 10))
def test_guidance_is_the_standard_form(seed, scale):
    cond, uncond, _ = draw(seed, True, 0, 1)
    found = guide(cond, uncond, scale=scale)
    torch.testing.assert_close(found, (1 - scale) * uncond + scale * cond, rtol=1e-10, atol=1e-10)
    # The public code's w is scale - 1.
    torch.testing.assert_close(found, cond + (scale - 1) * (cond - uncond), rtol=1e-10, atol=1e-10)


def test_guidance_ends():
    cond, uncond, _ = draw(0, True, 0, 1)
    assert torch.equal(guide(cond, uncond, scale=0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, scale=1.0), cond, rtol=1e-14, atol=1e-14)
