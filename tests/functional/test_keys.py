from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftk.errors import ShapeError
from sftk.functional import (
    Key,
    RecordedKey,
    Step,
    crop_length,
    draw_grid_step,
    draw_interval,
    draw_noise,
    draw_timestep,
    drop_condition,
    renoise,
)
from sftk.functional.sampling import shape_timestep, spread_blocks
from sftk.functional.schedule import unshift_sigma


@given(samples=st.lists(st.integers(0, 10**12), min_size=1, max_size=6), data=st.data())
def test_a_sample_gets_the_same_noise_under_any_split(samples, data):
    cut = data.draw(st.integers(0, len(samples)))
    whole = Key(seed=7, samples=tuple(samples)).normal("noise", (3, 2))
    parts = [Key(seed=7, samples=tuple(s)).normal("noise", (3, 2)) for s in (samples[:cut], samples[cut:]) if s]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"phase": "critic"}, {"update": 1}, {"samples": (1,)}, {"name": "score_noise"}],
    ids=lambda change: next(iter(change)),
)
def test_what_tells_draws_apart(other):
    base = {"seed": 0, "phase": "generator", "update": 0, "samples": (0,), "name": "noise"}

    def draw(seed, phase, update, samples, name):
        key = Key(seed=seed, phase=phase, update=update, samples=samples)
        return key.normal(name, (8,)), key.uniform(name, (8,)), key.integers(name, 0, 2**60, 4)

    first, second = draw(**base), draw(**(base | other))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert (first[2] == second[2]) is ("samples" in other)


def test_fields_do_not_run_into_one_another():
    one, two = Key(seed=1, phase="a", update=11), Key(seed=1, phase="a", update=1)
    assert not torch.equal(one.normal("x", (4,)), two.normal("1x", (4,)))


def test_dtypes_share_their_noise():
    key = Key(seed=0, samples=(0, 1))
    single = key.normal("noise", (64,))
    assert torch.equal(key.normal("noise", (64,), dtype=torch.float64), single.double())
    assert torch.equal(key.normal("noise", (64,), dtype=torch.bfloat16), single.bfloat16())


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    Key(seed=0).normal("noise", (4,))
    assert torch.equal(torch.get_rng_state(), state)


def test_distributions():
    key = Key(seed=3, samples=tuple(range(200)))
    normal, uniform = key.normal("n", (250,)), key.uniform("u", (250,))
    count = normal.numel()
    assert abs(normal.mean().item()) < 4 / count**0.5
    assert abs(normal.var().item() - 1) < 4 * (2 / count) ** 0.5
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 4 * (1 / 12 / count) ** 0.5
    # Samples are independent of one another.
    assert torch.corrcoef(normal).fill_diagonal_(0).abs().max() < 0.35


@given(low=st.integers(-5, 5), span=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_integers_lie_in_their_range(low, span, seed):
    drawn = Key(seed=seed).integers("exit", low, low + span, 8)
    assert len(drawn) == 8
    assert all(low <= value < low + span for value in drawn)


def test_integers_are_even():
    drawn = Key(seed=0).integers("exit", 0, 4, 4000)
    assert all(abs(drawn.count(v) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for v in range(4))
    # A longer draw begins with the shorter one.
    assert Key(seed=0).integers("exit", 0, 4, 3) == drawn[:3]


def test_recorded_key():
    key = RecordedKey(tensors={"noise": torch.ones(2, 3)}, choices={"exit": (2, 1)})
    assert key.normal("noise", (3,), dtype=torch.float64).dtype == torch.float64
    assert torch.equal(key.uniform("noise", (3,)), torch.ones(2, 3))
    assert key.integers("exit", 0, 3, 2) == (2, 1)
    with pytest.raises(ShapeError, match=r"no tensor 'nois' was recorded, only \['noise'\]"):
        key.normal("nois", (3,))
    with pytest.raises(ShapeError, match=r"the recorded tensor 'noise' has shape \[2, 3\], expected \[B, \[4\]\]"):
        key.normal("noise", (4,))
    for arguments in (("exit", 0, 3, 3), ("exit", 0, 2, 1), ("length", 0, 3, 1)):
        with pytest.raises(ShapeError, match="recorded as"):
            key.integers(*arguments)


# The transforms that draw

LIKE = torch.zeros(64, 6, 1)
KEY = Key(seed=5, samples=tuple(range(64)))


def test_draw_noise_takes_shape_dtype_and_name():
    noise = draw_noise(KEY, LIKE.double(), name="a")
    assert (noise.shape, noise.dtype) == (LIKE.shape, torch.float64)
    assert not torch.equal(noise, draw_noise(KEY, LIKE.double(), name="b"))


@given(
    low=st.floats(0, 500),
    span=st.floats(1, 500),
    shift=st.floats(0.5, 10),
    per=st.sampled_from(["sample", "block", "frame"]),
)
def test_timesteps_are_shifted_once_from_their_range(low, span, shift, per):
    timestep = draw_timestep(KEY, LIKE, low=low, high=low + span, shift=shift, per=per)
    assert timestep.shape == (64, 6)
    raw = 1000 * unshift_sigma(timestep.double() / 1000, shift)
    assert raw.min() >= low - 0.01
    assert raw.max() <= low + span + 0.01
    if span > 100:
        assert raw.max() - raw.min() > 0.8 * span


def test_timesteps_are_clamped_after_the_shift():
    timestep = draw_timestep(KEY, LIKE, shift=5.0, clamp=(300.0, 980.0), per="frame")
    assert timestep.min().item() == pytest.approx(300)
    assert timestep.max().item() == pytest.approx(980)
    unclamped = draw_timestep(KEY, LIKE, shift=5.0, per="frame")
    assert torch.equal(timestep, unclamped.clamp(300.0, 980.0))


def test_timesteps_per_sample_block_and_frame():
    draws = {per: draw_timestep(KEY, LIKE, per=per, frames_per_block=3) for per in ("sample", "block", "frame")}
    assert [len(set(draws[per][0].tolist())) for per in ("sample", "block", "frame")] == [1, 2, 6]
    blocks = draws["block"].unflatten(1, (2, 3))
    assert (blocks == blocks[:, :, :1]).all()
    uneven = draw_timestep(KEY, torch.zeros(64, 7, 1), per="block", frames_per_block=3, independent_first_frame=True)
    assert [len(set(part.tolist())) for part in uneven[0].split([1, 3, 3])] == [1, 1, 1]
    assert len(set(uneven[0].tolist())) == 3
    assert spread_blocks(torch.arange(7)[None], (1, 3, 3)).tolist() == [[0, 1, 1, 1, 4, 4, 4]]


@pytest.mark.parametrize(
    ("flags", "low", "high"),
    [
        ({}, 0, 1000),
        ({"ts_schedule": True}, 500, 1000),
        ({"ts_schedule_max": True}, 0, 750),
        ({"ts_schedule": True, "ts_schedule_max": True}, 500, 750),
    ],
)
def test_ts_schedule(flags, low, high):
    timestep = draw_timestep(KEY, LIKE, 750.0, 500.0, per="frame", **flags)
    assert low <= timestep.min() < low + 20
    assert high - 20 < timestep.max() <= high
    if flags:
        with pytest.raises(ShapeError, match="same_step_across_blocks: true"):
            draw_timestep(KEY, LIKE, None, None, per="frame", **flags)


def test_shape_timestep_of_one_is_the_identity():
    raw = torch.tensor([0.0, 250.0, 1000.0])
    assert torch.equal(shape_timestep(raw, 1.0), raw)


def test_crop_length():
    noise = torch.arange(9.0)[None]
    assert crop_length(Key(seed=0), noise) is noise
    seen = set()
    for update in range(40):
        found = crop_length(Key(seed=0, update=update), noise, min_frames=3)
        assert torch.equal(found, noise[:, : found.shape[1]])
        seen.add(found.shape[1])
    assert seen == {3, 6, 9}
    assert crop_length(Key(seed=0), noise, min_frames=9).shape[1] == 9
    with pytest.raises(ShapeError, match="4 frames do not divide into blocks of 3; take 3 or 6 frames"):
        crop_length(Key(seed=0), noise, min_frames=4)
    for more in (12, 15):
        with pytest.raises(ShapeError, match=f"min_frames {more} is more than the 9 frames"):
            crop_length(Key(seed=0), noise, min_frames=more)


@pytest.mark.parametrize(
    "draw",
    [
        lambda key, like: draw_noise(key, like),
        lambda key, like: draw_timestep(key, like),
        lambda key, like: draw_interval(key, like),
        lambda key, like: draw_grid_step(key, like),
        lambda key, like: drop_condition(key, like, like),
        lambda key, like: renoise(like, key, Step(index=0, timestep=1000.0, next_timestep=500.0)),
    ],
)
def test_one_samples_numbers_are_not_spread_over_a_batch(draw):
    with pytest.raises(ShapeError, match=r"for 1 samples, the batch has 2; give Key\(samples=\.\.\.\)"):
        draw(Key(seed=0), torch.zeros(2, 3, 4, 2, 2))


def test_drop_condition():
    key = Key(seed=0, samples=tuple(range(1000)))
    yes, no = torch.ones(1000, 2, 3), torch.zeros(1000, 2, 3)
    assert torch.equal(drop_condition(key, yes, no, rate=0.0), yes)
    assert torch.equal(drop_condition(key, yes, no, rate=1.0), no)
    dropped = drop_condition(key, yes, no, rate=0.1)
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert abs((per_sample[:, 0] == 0).float().mean().item() - 0.1) < 4 * (0.09 / 1000) ** 0.5
