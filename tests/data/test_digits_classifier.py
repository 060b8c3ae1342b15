import pytest
import torch

from sftk.data.digits import load_digits, render_clips
from sftk.data.digits_classifier import WEIGHTS, classify_clips, fit_classifier, load_classifier, save_classifier
from sftk.errors import CheckpointError, ShapeError


def held_out_clips(frames):
    digits = load_digits("test")
    index = torch.arange(len(digits.labels))
    return render_clips(digits.images, index % 4, torch.stack((7 * index, 3 * index), 1), frames), digits.labels


def test_held_out_clips_are_recognised():
    video, labels = held_out_clips(16)
    log_probs, features = classify_clips(load_classifier(), video)
    assert (log_probs.argmax(-1) == labels).float().mean() >= 0.985
    assert features.shape == (len(labels), 32)


def test_noisy_clips_are_recognised():
    video, labels = held_out_clips(4)
    noise = 0.15 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    assert (classify_clips(load_classifier(), (video + noise).clamp(0, 1))[0].argmax(-1) == labels).float().mean() >= 0.97


def test_clips_average_frames_and_hold_no_global_state():
    video, _ = held_out_clips(3)
    state = torch.get_rng_state()
    classifier = load_classifier()
    log_probs, features = classify_clips(classifier, video[:4])
    frame_log_probs, frame_features = classifier(video[:4].flatten(0, 1))
    torch.testing.assert_close(log_probs, frame_log_probs.view(4, 3, 10).mean(1))
    torch.testing.assert_close(features, frame_features.view(4, 3, 32).mean(1))
    torch.testing.assert_close(frame_log_probs.exp().sum(-1), torch.ones(12))
    assert torch.equal(state, torch.get_rng_state())


def test_even_shifts_on_the_torus_change_nothing():
    video, _ = held_out_clips(1)
    classifier = load_classifier()
    expected = classify_clips(classifier, video[:8])[0]
    torch.testing.assert_close(classify_clips(classifier, video[:8].roll((6, 10), (2, 3)))[0], expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_video_and_not_the_weights():
    video, labels = held_out_clips(2)
    video = (0.8 * video[:4] + 0.1).requires_grad_()
    classifier = load_classifier()
    log_probs = classify_clips(classifier, video)[0].gather(1, labels[:4, None]).sum()
    (gradient,) = torch.autograd.grad(log_probs, video)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((2, 3)) > 0).all()
    with torch.no_grad():
        better = classify_clips(classifier, video + 1e-3 * gradient)[0].gather(1, labels[:4, None]).sum()
    assert better > log_probs


def test_assets_are_small_and_parameters_few():
    assert WEIGHTS.stat().st_size < 100_000
    assert sum(parameter.numel() for parameter in load_classifier().parameters()) < 40_000


def test_fitting_learns_and_follows_its_seed():
    video, labels = held_out_clips(1)
    one, other = fit_classifier(seed=0, steps=120, batch=64), fit_classifier(seed=1, steps=2, batch=4)
    assert (classify_clips(one, video)[0].argmax(-1) == labels).float().mean() > 0.4
    assert not torch.equal(one.head.weight, other.head.weight)


def test_broken_weights_say_how_to_mend_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors.*python -m sftk\.data\.digits_classifier"):
        load_classifier(path=tmp_path / "none.safetensors")
    path = save_classifier(torch.nn.Linear(1, 1), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load_classifier(path=path)


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 0, 16, 16), (2, 3, 8, 8)])
def test_shapes_are_checked(shape):
    with pytest.raises(ShapeError, match=r"expected \[B, F, 16, 16\]"):
        classify_clips(load_classifier(), torch.zeros(shape))
