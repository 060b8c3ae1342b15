"""Long training sequences: the judged window, its picture and its gradient, against the same written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftk.core import Graph
from sftk.data.codecs import digits_codec
from sftk.errors import ShapeError, SpecError
from sftk.functional import Key, first_frames, last_frames_with_image, last_picture
from sftk.functional.last_frames import ToyCodec

STEPS = {"steps": (1000, 500), "frames_per_block": 3, "window": 6}
LONG = {**STEPS, "judged_frames": 6, "grad_frames": 6}


@pytest.fixture(scope="module")
def vae():
    """A tiny VAE of Wan with random weights, as a codec."""
    diffusers = pytest.importorskip("diffusers")
    from sftk.models.vae import WanVae, decode, encode

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = WanVae(diffusers.AutoencoderKLWan(base_dim=4).requires_grad_(False).eval())

    class Codec:
        def decode(self, latents):
            return decode(made, latents.float())

        def encode(self, video):
            return encode(made, video[None])[0]

    return Codec()


def plan(batch: int, frames: int) -> torch.Tensor:
    return torch.ones(batch, frames, dtype=torch.bool)


def state(randn, frames: int, seed: int = 0) -> dict[str, Any]:
    return {
        "noise": randn(2, frames, 4, 4, 4),
        "prompt_embeds": randn(2, 4, 8),
        "negative_embeds": randn(2, 4, 8),
        "latents": randn(2, frames, 4, 4, 4),
        "key": Key(seed=seed, phase="generator", update=3, samples=(0, 1)),
    }


@pytest.fixture(scope="module")
def models(make_model):
    return {name: make_model(seed=i) for i, name in enumerate(("generator", "real_score", "fake_score"))}


def test_the_digits_picture_is_the_frame_itself(randn):
    codec, x0 = digits_codec(), randn(2, 9, 4, 8, 8) * 0.05
    judged, mask = last_frames_with_image(codec, x0, plan(2, 9), frames=6)
    torch.testing.assert_close(judged, x0[:, 3:], rtol=0, atol=1e-9)
    assert mask.tolist() == [[False] * 3 + [True] * 3] * 2


def test_wans_picture_is_the_last_of_the_frames_before_encoded_alone(vae, randn):
    x0 = randn(2, 9, 16, 2, 3).float()
    judged, mask = last_frames_with_image(vae, x0, plan(2, 9), frames=6)
    pictures = vae.decode(x0[:, :4])  # 3 frames before the window, and the window's first
    assert pictures.shape[1] == 1 + 4 * 3
    expected = torch.stack([vae.encode(one[-1:]) for one in pictures])
    assert torch.equal(judged[:, :1], expected)
    assert torch.equal(judged[:, 1:], x0[:, 4:])
    assert (judged[:, 0] - x0[:, 3]).abs().mean() > 0.1
    assert mask.sum() == 6


@pytest.mark.parametrize(
    ("frames", "given", "judged", "options", "fixed"),
    [
        (9, 0, 6, {}, 3),
        (9, 0, 4, {}, 1),  # the window begins with the last frame of a block
        (9, 0, 5, {}, 2),
        (9, 0, 6, {"frames_per_block": 1}, 1),
        (10, 0, 7, {"independent_first_frame": True}, 1),  # frames 1 to 3 are a block, frame 3 begins the window
        (10, 1, 7, {}, 1),  # the same after a given picture
        (9, 3, 8, {}, 2),  # it begins among the given frames
    ],
)
def test_the_block_of_the_picture_carries_no_gradient(randn, frames, given, judged, options, fixed):
    x0 = randn(2, frames, 4, 2, 2).requires_grad_()
    initial = randn(2, given, 4, 2, 2) if given else None
    out, mask = last_frames_with_image(ToyCodec(), x0, plan(2, frames), initial, frames=judged, **options)
    assert mask.tolist() == [[False] * fixed + [True] * (judged - fixed)] * 2
    (grad,) = torch.autograd.grad(out.square().sum(), x0)
    moved = grad.abs().amax(dim=(2, 3, 4)) > 0
    assert moved.tolist() == [[False] * (frames - judged + fixed) + [True] * (judged - fixed)] * 2


def test_frames_that_the_rollout_keeps_from_gradient_stay_so(randn):
    mask = torch.tensor([[False] * 8 + [True]] * 2)
    assert last_frames_with_image(ToyCodec(), randn(2, 9, 4, 2, 2), mask, frames=6)[1].sum() == 2


@pytest.mark.parametrize("name", ["dmd_generator", "sid_generator"])
def test_a_rollout_that_is_no_longer_is_judged_as_it_is(models, randn, name):
    given = state(randn, 6)
    wanted = [models["generator"].get_parameter("blocks.0.ffn.0.weight"), models["generator"].get_parameter("head.head.bias")]
    found = Graph.from_spec(f"specs/{name}_long.yaml", **LONG)(given, {**models, "codec": None})
    plain = Graph.from_spec(f"specs/{name}.yaml", **STEPS)(given, models)
    assert torch.equal(found["loss"], plain["loss"])
    for a, b in zip(torch.autograd.grad(found["loss"], wanted), torch.autograd.grad(plain["loss"], wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad_frames", [6, 3])
def test_dmd_on_a_long_rollout_equals_its_parts(models, randn, grad_frames):
    """The window by hand: a rollout, its last frames with the picture, the scores of those, and the masked surrogate."""
    given = state(randn, 12)
    graph = Graph.from_spec("specs/dmd_generator_long.yaml", **{**LONG, "grad_frames": grad_frames})
    out = graph(given, models | {"codec": ToyCodec()})
    rollout = Graph.from_spec("specs/rollout.yaml", **STEPS)(given, {"denoiser": models["generator"]})
    x0 = rollout["x0"]
    window = torch.cat([last_picture(ToyCodec(), x0[:, :7]), x0[:, 7:]], dim=1)
    torch.testing.assert_close(out["x0"], window, rtol=0, atol=0)
    judge = Graph.from_spec("specs/dmd.yaml")
    parts = {key: rollout[key] for key in ("exit_from", "exit_to")}
    mask = plan(2, 6) & (torch.arange(6) >= 3)
    expected = judge({**given, **parts, "x0": window, "gradient_mask": mask}, models)
    assert torch.equal(out["loss"], expected["loss"])
    assert out["loss_weight"] == expected["loss_weight"] == 2 * 3 * 4 * 4 * 4
    wanted = list(models["generator"].parameters())
    for a, b in zip(torch.autograd.grad(out["loss"], wanted), torch.autograd.grad(expected["loss"], wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_the_objectives_leave_masked_frames_alone(models, randn, name):
    given = state(randn, 12)
    x0 = randn(2, 12, 4, 4, 4).requires_grad_()
    judged, mask = last_frames_with_image(ToyCodec(), x0, plan(2, 12), frames=6)
    judge = Graph.from_spec(f"specs/{name}.yaml")
    out = judge({**given, "x0": judged, "gradient_mask": mask, "exit_from": None, "exit_to": None}, models)
    (grad,) = torch.autograd.grad(out["loss"], x0)
    assert (grad[:, :9] == 0).all()
    assert (grad[:, 9:].abs().amax(dim=(2, 3, 4)) > 0).all()


def test_lengths_are_drawn_and_the_window_stays(models, randn):
    graph = Graph.from_spec("specs/score_critic_long.yaml", **LONG, min_frames=6)
    for seed in range(5):
        out = graph(state(randn, 12, seed), {**models, "codec": ToyCodec()})
        assert out["x0"].shape[1] == 6
        assert out["loss"].isfinite()


def test_wrong_lengths_and_codecs_are_named(randn):
    x0 = randn(2, 9, 4, 2, 2)
    with pytest.raises(ShapeError, match=r"gradient_mask has shape \[2, 6\] .*leave `output_frames` null"):
        last_frames_with_image(ToyCodec(), x0, plan(2, 6), frames=6)
    with pytest.raises(ShapeError, match=r"latents of \[1, 4, 1, 1\] of one picture, the rollout has frames of \[1, 3, 2, 2\]"):
        last_frames_with_image(Smaller(), x0[:, :, :3], plan(2, 9), frames=6)
    with pytest.raises(ShapeError, match="9 frames do not divide into blocks of 2"):
        last_frames_with_image(ToyCodec(), x0, plan(2, 9), frames=6, frames_per_block=2)
    with pytest.raises(SpecError, match=r"a picture and at least one frame after it are judged, found 1"):
        Graph.from_spec("specs/rollout_long.yaml", judged_frames=1)


class Smaller(ToyCodec):
    def encode(self, video):
        return super().encode(video)[:, :, :1, :1]


def test_real_clips_are_cut_to_the_window(randn):
    latents = randn(2, 9, 4, 2, 2)
    assert torch.equal(first_frames(latents, frames=6), latents[:, :6])
    assert first_frames(latents, frames=12).shape[1] == 9
