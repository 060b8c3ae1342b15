import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftk.data.digits import DigitClips, decode_latents
from sftk.data.digits_classifier import load_classifier
from sftk.data.digits_metrics import (
    REFERENCE,
    clip_features,
    compute_reference,
    digit_accuracy,
    direction_accuracy,
    evaluate_clips,
    evaluate_real,
    feature_statistics,
    frechet_distance,
    reference_statistics,
)
from sftk.errors import DataError, NonFiniteError, ShapeError


@functools.cache
def real(count=600, frames=21, seed=11):
    batch = DigitClips("test", frames=frames, seed=seed).__getitems__(range(count))
    return decode_latents(batch["latents"]), batch["prompt"], batch["direction"]


def test_real_clips_are_near_and_right():
    scores = evaluate_real()
    assert scores["digit_accuracy"] >= 0.985
    assert scores["direction_accuracy"] == 1.0
    assert 0.0 < scores["frechet"] < 3.0


def test_late_windows_of_long_clips_are_near_too():
    video, prompts, _ = real(frames=63)
    scores = evaluate_clips(video[:, -21:], prompts)
    assert scores["direction_accuracy"] == 1.0
    assert scores["frechet"] < 3.0


def test_noise_is_far_and_collapse_and_stillness_are_between():
    video, prompts, _ = real()
    noise = decode_latents(torch.randn(600, 21, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    scores = evaluate_clips(noise, prompts)
    assert scores["frechet"] > 300
    assert scores["digit_accuracy"] < 0.2
    assert scores["direction_accuracy"] < 0.3
    assert evaluate_clips(video[:1].expand_as(video), prompts)["frechet"] > 100
    still = evaluate_clips(video[:, :1].expand_as(video), prompts)
    assert still["frechet"] > 10
    assert still["direction_accuracy"] == 0.0
    assert still["digit_accuracy"] > 0.95


def test_frechet_rises_with_noise():
    video, prompts, _ = real()
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    found = [evaluate_clips((video + sigma * noise).clamp(0, 1), prompts)["frechet"] for sigma in (0.0, 0.1, 0.3)]
    assert found[0] < found[1] < found[2]


def test_the_shipped_reference_is_what_the_code_computes():
    shipped = reference_statistics()
    assert REFERENCE.stat().st_size < 100_000
    assert shipped.cov.dtype == torch.float64
    made = compute_reference()
    torch.testing.assert_close(made.mean, shipped.mean, rtol=1e-4, atol=1e-3)
    assert frechet_distance(made.mean, made.cov, shipped.mean, shipped.cov) < 1e-2


def test_direction_needs_motion_the_right_way():
    video, _, directions = real(40)
    assert direction_accuracy(video, directions) == 1.0
    assert direction_accuracy(video.flip(1), directions) == 0.0
    assert direction_accuracy(video[:, :1].expand_as(video), directions) == 0.0
    assert direction_accuracy(torch.zeros_like(video), directions) == 0.0
    assert direction_accuracy(video[:, :2], directions) == 1.0


def test_direction_is_a_majority():
    video, _, directions = real(8)
    stop = video.clone()
    stop[:, 8:] = video[:, 7:8]
    assert direction_accuracy(stop, directions) == 0.0
    stop = video.clone()
    stop[:, 14:] = video[:, 13:14]
    assert direction_accuracy(stop, directions) == 1.0


def test_accuracies_check_shapes():
    with pytest.raises(ShapeError, match=r"expected \[B, 10\] and \[B\]"):
        digit_accuracy(torch.zeros(3, 10), torch.zeros(2))
    with pytest.raises(ShapeError, match="F at least 2"):
        direction_accuracy(torch.zeros(3, 1, 16, 16), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match="one for each clip"):
        direction_accuracy(torch.zeros(3, 2, 16, 16), torch.zeros(2, dtype=torch.long))


def test_features_are_per_clip():
    video, _, _ = real(6)
    classifier = load_classifier()
    features = clip_features(classifier, video)
    order = torch.tensor([3, 0, 5])
    torch.testing.assert_close(clip_features(classifier, video[order]), features[order], rtol=1e-4, atol=1e-4)
    assert features.shape == (6, 48)


def gaussian(seed, size, rank):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return torch.randn(size, generator=generator, dtype=torch.float64), factor @ factor.T


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_frechet_is_a_symmetric_squared_distance(seed, size, rank1, rank2):
    one, two = gaussian(seed, size, rank1), gaussian(seed + 1, size, rank2)
    distance = frechet_distance(*one, *two)
    assert distance >= 0
    assert distance == pytest.approx(frechet_distance(*two, *one), rel=1e-5, abs=1e-5)
    assert frechet_distance(*one, *one) == pytest.approx(0.0, abs=1e-5 * (1 + one[1].trace().item()))


@given(st.floats(0, 5), st.floats(0, 5), st.floats(-5, 5))
def test_frechet_of_one_dimension_is_known(deviation1, deviation2, shift):
    def column(value):
        return torch.tensor([value], dtype=torch.float64)

    found = frechet_distance(column(0.0), column(deviation1**2)[None], column(shift), column(deviation2**2)[None])
    assert found == pytest.approx(shift**2 + (deviation1 - deviation2) ** 2, abs=1e-9)


def test_frechet_reports_shapes_and_nan():
    mean, cov = gaussian(0, 3, 3)
    with pytest.raises(ShapeError, match=r"\[D\], \[D, D\]"):
        frechet_distance(mean, cov, mean[:2], cov)
    with pytest.raises(NonFiniteError, match="NaN"):
        frechet_distance(mean * float("nan"), cov, mean, cov)


def test_statistics_match_the_definition():
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    found = feature_statistics(features)
    centred = features.double() - features.double().mean(0)
    torch.testing.assert_close(found.cov, centred.T @ centred / 6)
    with pytest.raises(DataError, match="at least two clips"):
        feature_statistics(features[:1])


def test_evaluation_reports_what_is_wrong():
    video, prompts, _ = real(4)
    with pytest.raises(ShapeError, match="found 3 prompts for 4 clips"):
        evaluate_clips(video, prompts[:3])
    with pytest.raises(NonFiniteError, match="diverged"):
        evaluate_clips(video * float("nan"), prompts)
    with pytest.raises(DataError, match="cannot read prompt"):
        evaluate_clips(video, ["a cat"] * 4)
