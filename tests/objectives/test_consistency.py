"""The consistency loss against its formula, and its graph on a flow whose paths are known."""

from __future__ import annotations

import pytest
import torch

from sftk.core import Graph
from sftk.errors import SpecError
from sftk.functional import Key
from sftk.objectives import consistency_loss


@pytest.mark.parametrize("huber", [0.0, 0.3])
def test_distance_against_its_formula(randn, huber):
    x0, target = randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    loss, weight = consistency_loss(x0, target, mask, huber=huber)
    error = (x0 - target)[mask]
    expected = error**2 if huber == 0 else (error**2 + huber**2) ** 0.5 - huber
    torch.testing.assert_close(loss, expected.sum())
    assert weight == expected.numel() == 3 * 16
    assert consistency_loss(x0, x0, huber=huber)[0] == 0


def test_a_wide_huber_distance_is_quadratic_and_a_narrow_one_linear(randn):
    x0, target = randn(2, 3, 1), randn(2, 3, 1)
    wide = consistency_loss(x0, target, huber=1e4)[0]
    torch.testing.assert_close(wide * 2e4, consistency_loss(x0, target)[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(consistency_loss(x0, target, huber=1e-6)[0], (x0 - target).abs().sum(), rtol=1e-4, atol=0)
    with pytest.raises(SpecError, match="a width is at least 0"):
        Graph([consistency_loss.node(huber=-1.0)], inputs=("x0", "target_x0"))


def test_the_target_carries_no_gradient(randn):
    x0, target = randn(1, 3, 1).requires_grad_(), randn(1, 3, 1).requires_grad_()
    loss, _ = consistency_loss(x0, target)
    torch.testing.assert_close(torch.autograd.grad(loss, x0, retain_graph=True)[0], 2 * (x0 - target).detach())
    assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)


def leads_to(mean: float, prompted: float = 0.0):
    """A model in the teacher-forcing layout that takes all for one clip: `mean`, and `prompted` times the prompt more."""

    def model(latents, timestep, prompt_embeds, *, layout, positions):
        sigma = (timestep / 1000)[:, :, None, None, None].clamp(min=1e-12)
        end = mean + prompted * prompt_embeds.mean(dim=(1, 2))[:, None, None, None, None]
        return (latents - end) / sigma, (), ()

    return model


@pytest.mark.parametrize("intervals", [1, 7])
def test_a_student_that_agrees_with_its_teacher_has_no_loss(randn, intervals):
    graph = Graph.from_spec("specs/consistency.yaml", shift=3.0, intervals=intervals, guidance=2.5, frames_per_block=2)
    ones = torch.ones(3, 2, 8, dtype=torch.float64)
    state = {
        "latents": randn(3, 4, 2, 4, 4),
        "prompt_embeds": ones,
        "negative_embeds": 0 * ones,
        "key": Key(seed=0, samples=(0, 1, 2)),
    }
    guided = 0.5 + 2.5 * 0.2  # what guidance makes of a teacher at 0.5 without and 0.7 with the prompt
    teacher, agrees, differs = leads_to(0.5, prompted=0.2), leads_to(guided), leads_to(guided + 0.1)
    out = graph(state, {"generator": agrees, "target": agrees, "real_score": teacher})
    assert out["loss"] / out["loss_weight"] < 1e-9
    out = graph(state, {"generator": differs, "target": agrees, "real_score": teacher})
    torch.testing.assert_close(out["loss"] / out["loss_weight"], torch.tensor(0.01, dtype=torch.float64), rtol=1e-4, atol=0)
    # At the end of the grid the target is where the teacher's step arrives, whatever the average says.
    out = graph(state, {"generator": agrees, "target": differs, "real_score": teacher})
    assert (out["loss"] / out["loss_weight"] < 1e-9) == (intervals == 1)
