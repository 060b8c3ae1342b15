from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftk.errors import ShapeError
from sftk.functional import euler_step, shift_sigma, timestep_to_sigma, warp_steps
from sftk.functional.schedule import (
    frame_timesteps,
    inference_timesteps,
    next_table_sigma,
    sigma_table,
    table_index,
    training_weights,
    unshift_sigma,
)

shifts = st.floats(0.1, 20)
sigmas = st.floats(0, 1)


@given(sigma=sigmas, shift=shifts)
def test_shift_and_unshift_invert(sigma, shift):
    assert unshift_sigma(shift_sigma(sigma, shift), shift) == pytest.approx(sigma, abs=1e-12)
    assert shift_sigma(unshift_sigma(sigma, shift), shift) == pytest.approx(sigma, abs=1e-12)
    assert 0 <= shift_sigma(sigma, shift) <= 1 + 1e-12


@given(sigma=sigmas, one=shifts, two=shifts)
def test_shifting_twice_multiplies_the_shifts(sigma, one, two):
    """So that a shift that is applied twice shows."""
    assert shift_sigma(shift_sigma(sigma, one), two) == pytest.approx(shift_sigma(sigma, one * two), abs=1e-9)


@given(timestep=st.floats(0, 1000), shift=shifts)
def test_continuous_sigma_is_exact_and_knows_no_shift(timestep, shift):
    t = torch.tensor([timestep], dtype=torch.float64)
    assert timestep_to_sigma(t, "continuous", shift).item() == timestep / 1000


def test_continuous_sigma_of_integers():
    assert timestep_to_sigma(torch.tensor([0, 250, 1000])).tolist() == [0.0, 0.25, 1.0]


@given(timestep=st.floats(0, 1000), shift=st.sampled_from([1.0, 3.0, 5.0, 8.0]))
def test_table_sigma_is_the_nearest_entry(timestep, shift):
    table = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / 1000 for i in range(1000))]
    nearest = min(table, key=lambda s: abs(1000 * s - timestep))
    found = timestep_to_sigma(torch.tensor([timestep]), "table", shift).item()
    # Halfway between two entries either may be taken.
    assert abs(found - timestep / 1000) == pytest.approx(abs(nearest - timestep / 1000), abs=2e-7)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_table_entries_map_to_themselves(shift):
    table = sigma_table(shift)
    assert table.shape == (1000,)
    assert (table.diff() < 0).all()
    assert table_index(table * 1000, shift).tolist() == list(range(1000))
    assert timestep_to_sigma(torch.tensor([0.0]), "table", 5.0).item() == pytest.approx(0.005 / 1.004, rel=1e-6)


def test_warped_steps_of_the_design():
    assert warp_steps([1000, 750, 500, 250], 5.0) == pytest.approx([1000, 937.5, 833.3333, 625])
    assert warp_steps([1000, 750, 0], 5.0) == pytest.approx([1000, 937.5, 0])
    assert warp_steps([1000, 750], 5.0, warp=False) == (1000.0, 750.0)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "the step list is empty; expected timesteps from 1000 downwards, such as [1000, 750, 500, 250]"),
        ([1000, 1000], "steps must descend, found 1000 after 1000 in [1000, 1000]"),
        ([500, 750], "steps must descend, found 750 after 500 in [500, 750]"),
        ([1500, -1], "the steps [1500, -1] lie outside [0, 1000]"),
    ],
)
def test_bad_step_lists(steps, message):
    with pytest.raises(ShapeError) as caught:
        warp_steps(steps, 5.0)
    assert str(caught.value) == message


def test_training_weights_are_a_bell_around_the_middle():
    weights, table = training_weights(5.0), sigma_table(5.0)
    assert weights.sum().item() == pytest.approx(1000, rel=1e-5)
    assert weights.min() == 0
    assert abs(table[weights.argmax()].item() - 0.5) < 0.01


def test_euler_step_is_per_element():
    sample, flow = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
    found = euler_step(sample, flow, torch.tensor([[1.0, 0.5], [0.3, 0.0]]), torch.tensor([[0.75, 0.0], [0.3, 0.0]]))
    assert found[..., 0].tolist() == [[-0.25, -0.5], [0.0, 0.0]]


def test_next_table_sigma_at_the_end_of_a_batch():
    timestep = torch.tensor([1000.0, 0.0])
    assert next_table_sigma(timestep, 1.0).tolist() == pytest.approx([0.999, 0.0])
    assert next_table_sigma(timestep, 1.0, whole_batch_end=True).tolist() == [0.0, 0.0]
    assert next_table_sigma(timestep[:1], 1.0, whole_batch_end=True).tolist() == pytest.approx([0.999])


@given(count=st.integers(1, 60), shift=shifts)
def test_inference_timesteps_descend_from_1000(count, shift):
    times = inference_timesteps(count, shift)
    assert len(times) == count
    assert times[0] == pytest.approx(1000)
    assert all(a > b > 0 for a, b in itertools.pairwise(times))
    assert [unshift_sigma(t / 1000, shift) for t in times] == pytest.approx([1 - i / count for i in range(count)])


@pytest.mark.parametrize(
    ("latents", "timestep"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_one_timestep_for_every_frame_keeps_its_precision(latents, timestep):
    times = frame_timesteps(torch.zeros(2, 3, 4, 2, 2, dtype=latents), 937.5)
    assert times.dtype == timestep
    assert times.tolist() == [[937.5] * 3] * 2
