from __future__ import annotations

import math

import pytest
import torch

from sftk.core import Graph
from sftk.errors import SpecError
from sftk.functional import ode_step, plan_ode
from sftk.functional.plan import Step


def given(randn):
    return {"noise": randn(2, 2, 1, 2, 2), "prompt_embeds": torch.ones(2, 1, 1), "negative_embeds": torch.zeros(2, 1, 1)}


def decay(latents, timestep, prompt_embeds, **_):
    """dx / d sigma = 0.7 x: exact at sigma 0 is exp(-0.7) x."""
    return 0.7 * latents, (), ()


def sample(state, denoiser, steps, **params):
    return Graph.from_spec("specs/sample_ode.yaml", steps=steps, **params)(state, {"denoiser": denoiser})["x0"]


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_converges_at_first_order_to_the_exact_solution(randn, shift):
    state = given(randn)
    exact = math.exp(-0.7) * state["noise"]
    errors = [(sample(state, decay, n, shift=shift, guidance=1.0) - exact).abs().max().item() for n in (40, 80, 160)]
    assert errors[2] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_straight_paths_are_exact_in_any_number_of_steps(randn, steps):
    state, target = given(randn), randn(2, 2, 1, 2, 2)

    def straight(latents, timestep, prompt_embeds, **_):
        return (latents - target) / (timestep / 1000)[:, :, None, None, None], (), ()

    torch.testing.assert_close(sample(state, straight, steps, guidance=1.0), target, rtol=1e-6, atol=1e-6)


def test_guidance_of_a_step(randn):
    state, calls = given(randn), []

    def conditional(latents, timestep, prompt_embeds, **_):
        calls.append(prompt_embeds.mean().item())
        return prompt_embeds.mean() * torch.ones_like(latents), (), ()

    step = Step(index=0, timestep=1000.0, next_timestep=250.0)
    arguments = (conditional, state["noise"], step, state["prompt_embeds"], state["negative_embeds"])
    torch.testing.assert_close(ode_step(*arguments, scale=4.0), state["noise"] - 4.0 * 0.75)
    assert calls == [1.0, 0.0]
    torch.testing.assert_close(ode_step(*arguments, scale=1.0), state["noise"] - 0.75)
    assert len(calls) == 3


def test_plan():
    plan = plan_ode(steps=4, shift=5.0)
    assert plan[0].timestep == 1000.0
    assert plan[-1].next_timestep == 0.0
    assert [a.next_timestep for a in plan[:-1]] == [b.timestep for b in plan[1:]]
    with pytest.raises(SpecError, match="a solver takes at least 1 step, found 0"):
        Graph([plan_ode.node(steps=0)], inputs=())
