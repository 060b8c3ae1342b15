from __future__ import annotations

import pytest
import torch

from sftk.core.graph import Graph
from sftk.data.builtins import builtin
from sftk.data.digits import encode_latents, load_digits, render_clips
from sftk.errors import ShapeError, SpecError
from sftk.objectives import combine_losses, reward_loss, score_reward

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips():
    """Latents of eight moving digits, and which digits they are."""
    digits = load_digits("test")
    video = render_clips(digits.images[:8], torch.zeros(8, dtype=torch.long), torch.full((8, 2), 3), frames=3)
    return encode_latents(video), digits.labels[:8]


def graph():
    return Graph.from_spec("specs/reward.yaml"), {
        "decoder": builtin("digits_decoder", CPU),
        "reward": builtin("digits_classifier", CPU),
    }


def test_the_digits_reward_prefers_the_right_digit(clips):
    latents, labels = clips
    spec, models = graph()
    right = spec({"x0": latents, "labels": labels}, models)
    wrong = spec({"x0": latents, "labels": (labels + 1) % 10}, models)
    assert right["score"].mean() > -0.5
    assert (wrong["score"] < right["score"] - 1).all()
    torch.testing.assert_close(right["loss"] / right["loss_weight"], -right["score"].mean())


def test_the_reward_reaches_the_latents_and_no_weight(clips):
    latents, labels = clips
    spec, models = graph()
    generator = torch.Generator().manual_seed(0)
    x0 = (latents + 0.7 * torch.randn(latents.shape, generator=generator)).requires_grad_()
    wanted = (labels + 3) % 10
    before = spec({"x0": x0, "labels": wanted}, models)
    (grad,) = torch.autograd.grad(before["loss"], x0)
    after = spec({"x0": x0 - 0.3 * grad / grad.abs().mean(), "labels": wanted}, models)
    assert (after["score"] > before["score"]).all()
    assert not any(p.requires_grad or p.grad is not None for p in models["reward"].parameters())


def test_combined_losses_add_means(randn):
    loss, weight, other, other_weight = (randn(1).exp()[0] for _ in range(4))
    total, total_weight = combine_losses(loss, weight, other, other_weight, scale=0.3)
    torch.testing.assert_close(total / total_weight, loss / weight + 0.3 * other / other_weight)
    assert total_weight is weight


def test_combined_losses_over_equal_micro_batches_are_those_of_the_whole(randn):
    first, second = randn(4, 6), randn(4)

    def of(rows):
        a, b = first[rows], second[rows]
        numbers = (a.square().sum(), a.new_tensor(a.numel()), b.sum(), b.new_tensor(b.numel()))
        return combine_losses(*numbers, scale=0.3)

    parts = [of([0, 1]), of([2, 3])]
    whole, whole_weight = of([0, 1, 2, 3])
    total, weight = (sum(column) for column in zip(*parts, strict=True))
    torch.testing.assert_close(total / weight, whole / whole_weight)


def test_reward_loss_is_minus_the_mean():
    loss, weight = reward_loss(torch.tensor([1.0, 2.0, 6.0], dtype=torch.bfloat16))
    assert (loss / weight).item() == -3.0
    assert loss.dtype == torch.float32


def test_a_reward_of_another_shape_and_an_unknown_module():
    with pytest.raises(ShapeError, match=r"one number for each of 2 samples, found \[2, 3\]"):
        score_reward(lambda video, labels: video, torch.zeros(2, 3), None)
    with pytest.raises(SpecError, match="unknown built-in model 'digit_decoder'; did you mean 'digits_decoder'"):
        builtin("digit_decoder", CPU)


def test_dmd_with_a_reward_is_dmd_plus_the_reward(make_model, randn):
    """The gradient on the student's weights is the sum of both, each as its own graph gives it."""
    from sftk.functional import Key

    models = {n: make_model(torch.float32, seed) for seed, n in enumerate(("generator", "real_score", "fake_score"))}
    models |= graph()[1]
    state = {
        "noise": randn(2, 3, 4, 8, 8).float(),
        "prompt_embeds": randn(2, 4, 8).float(),
        "negative_embeds": torch.zeros(2, 4, 8),
        "labels": torch.tensor([1, 7]),
        "key": Key(seed=0, samples=(0, 1)),
    }
    options = {"steps": (1000, 500), "shift": 3.0}
    weights = list(models["generator"].parameters())
    both = Graph.from_spec("specs/dmd_reward.yaml", reward_scale=0.3, **options)(state, models)
    dmd = Graph.from_spec("specs/dmd_generator.yaml", **options)(state, models)
    reward = Graph.from_spec("specs/reward.yaml")(state | {"x0": dmd["x0"]}, models)
    assert torch.equal(both["x0"], dmd["x0"])
    expected = torch.autograd.grad(
        dmd["loss"] / dmd["loss_weight"] + 0.3 * reward["loss"] / reward["loss_weight"], weights, allow_unused=True
    )
    found = torch.autograd.grad(both["loss"] / both["loss_weight"], weights, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
