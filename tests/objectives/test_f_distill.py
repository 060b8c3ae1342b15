"""specs/f_distill.yaml against DMD2, of which it is a weighting."""

from __future__ import annotations

import pytest
import torch

from sftk.core.graph import Graph
from sftk.functional import Key
from sftk.objectives import divergence_weight
from sftk.objectives.dmd import surrogate_loss

OPTIONS = {"steps": (1000, 500), "shift": 3.0, "gan_weight": 0.2}


class Judge:
    """Logits that differ from sample to sample, from a backbone's last hidden states."""

    features_at = (-1,)

    def __call__(self, features, timestep):
        return 3 * torch.stack([features[0].mean(dim=(1, 2)), features[0].std(dim=(1, 2))], dim=1)


@pytest.fixture
def models(make_model):
    named = {name: make_model(seed=seed) for seed, name in enumerate(("generator", "real_score", "fake_score"))}
    for name in ("real_score", "fake_score"):
        named[name].requires_grad_(False)
    return named | {"discriminator": Judge()}


@pytest.fixture
def state(randn):
    return {
        "noise": randn(3, 6, 4, 4, 4),
        "prompt_embeds": randn(3, 4, 8),
        "negative_embeds": randn(3, 4, 8),
        "key": Key(seed=0, samples=(0, 1, 2)),
    }


def run(spec, state, models, **options):
    out = Graph.from_spec(spec, **OPTIONS, **options)(state, models)
    grads = torch.autograd.grad(out["loss"] / out["loss_weight"], list(models["generator"].parameters()), allow_unused=True)
    return out, [g for g in grads if g is not None]


def test_the_reverse_divergence_is_dmd2(models, state):
    found, grads = run("specs/f_distill.yaml", state, models, divergence="reverse_kl")
    expected, reference = run("specs/dmd2_generator.yaml", state, models)
    for key in ("loss", "loss_weight", "x0"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=0)
    for a, b in zip(grads, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("divergence", ["jensen_shannon", "forward_kl"])
def test_another_one_weighs_the_samples(models, state, divergence):
    out, grads = run("specs/f_distill.yaml", state, models, divergence=divergence)
    rollout = Graph.from_spec("specs/rollout.yaml", steps=(1000, 500), shift=3.0)
    x0 = rollout(state, {"denoiser": models["generator"]})["x0"]
    gan = Graph.from_spec("specs/adversarial.yaml", shift=3.0)(state | {"x0": x0}, models)
    dmd = Graph.from_spec("specs/dmd.yaml", shift=3.0)(state | {"x0": x0}, models)
    log_ratio = gan["fake_logits"].detach().mean(dim=1)
    h = divergence_weight((log_ratio - log_ratio.exp().mean().log()).clamp(-5, 5), divergence)
    assert h.max() > 1.05 * h.min()
    loss, weight = surrogate_loss(x0, dmd["grad"] * (h / h.mean())[:, None, None, None, None])
    total = loss / weight + OPTIONS["gan_weight"] * gan["loss"] / gan["loss_weight"]
    reference = torch.autograd.grad(total, list(models["generator"].parameters()), allow_unused=True)
    for a, b in zip(grads, (g for g in reference if g is not None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)
    assert out["gradient_weight"].shape == (3, 6)
