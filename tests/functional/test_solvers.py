from __future__ import annotations

import math

import pytest
import torch

from sftk.core import Graph
from sftk.errors import SpecError
from sftk.functional import Key, KVCache, commit_context, plan_blocks, plan_ode, predict_step, solver_step
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

    def stepped(**options):
        return solver_step(state["noise"], predict_step(*arguments, **options), step)[0]

    torch.testing.assert_close(stepped(scale=4.0), state["noise"] - 4.0 * 0.75)
    assert calls == [1.0, 0.0]
    torch.testing.assert_close(stepped(scale=1.0), state["noise"] - 0.75)
    assert calls == [1.0, 0.0, 1.0]


def test_plan():
    plan, solver = plan_ode(steps=4, shift=5.0)
    assert solver is None
    assert plan[0].timestep == 1000.0
    assert plan[-1].next_timestep == 0.0
    assert [a.next_timestep for a in plan[:-1]] == [b.timestep for b in plan[1:]]
    with pytest.raises(SpecError, match="a solver takes at least 1 step, found 0"):
        Graph([plan_ode.node(steps=0)], inputs=())


# Block by block


def causal(state, denoiser, **params):
    return Graph.from_spec("specs/sample_causal.yaml", **({"rope": "relative", "frames_per_block": 2} | params))(
        state, {"denoiser": denoiser}
    )["x0"]


def clip(randn, frames: int = 6):
    embeds = {name: randn(2, 4, 8) for name in ("prompt_embeds", "negative_embeds")}
    return {"noise": randn(2, frames, 4, 4, 4), "key": Key(seed=0, samples=(0, 1)), **embeds}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_one_block_equals_the_bidirectional_sampler(make_model, randn, guidance, rope):
    model, state = make_model(), clip(randn, frames=3)
    found = causal(state, model, steps=4, shift=3.0, guidance=guidance, frames_per_block=3, rope=rope)
    torch.testing.assert_close(found, sample(state, model, 4, shift=3.0, guidance=guidance), rtol=1e-9, atol=1e-11)


def test_first_block_does_not_depend_on_what_follows_and_the_others_on_what_came_before(make_model, randn):
    model, state = make_model(), clip(randn)
    whole = causal(state, model, steps=2, guidance=2.0)
    short = causal(state | {"noise": state["noise"][:, :2]}, model, steps=2, guidance=2.0)
    torch.testing.assert_close(whole[:, :2], short, rtol=1e-9, atol=1e-11)
    changed = state | {"noise": torch.cat([-state["noise"][:, :2], state["noise"][:, 2:]], 1)}
    assert (causal(changed, model, steps=2, guidance=2.0)[:, 2:] - whole[:, 2:]).abs().amax((0, 2, 3, 4)).min() > 1e-4


def test_one_step_without_guidance_equals_a_one_step_rollout(make_model, randn):
    """From sigma 1 to 0 Euler's method gives `noise - flow`, the x0 of the only step of a rollout."""
    model, state = make_model(), clip(randn)
    rollout = Graph.from_spec("specs/rollout.yaml", steps=(1000,), frames_per_block=2, window=4, rope="relative")
    given = {name: state[name] for name in ("noise", "prompt_embeds", "key")}
    with torch.no_grad():
        expected = rollout(given, {"denoiser": model})["x0"]
        found = causal(state, model, steps=1, guidance=1.0, window=4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_each_pass_has_the_context_of_its_own_condition(make_model, randn):
    """Written out by hand: two caches, of the same clean block under two prompts."""
    model, state = make_model(), clip(randn, frames=4)
    blocks, _ = plan_blocks(state["noise"], frames_per_block=2)
    caches = {name: KVCache(rope="relative") for name in ("prompt_embeds", "negative_embeds")}
    found = []
    with torch.no_grad():
        for block in blocks:
            x = state["noise"][:, block.offset : block.offset + 2]
            for step in plan_ode(steps=3, shift=5.0)[0]:
                times = torch.full((2, 2), step.timestep, dtype=x.dtype)
                cond, uncond = (model(x, times, state[n], cache=caches[n], positions=block.positions)[0] for n in caches)
                x = x + (step.next_timestep - step.timestep) / 1000 * (uncond + 3.0 * (cond - uncond))
            caches = {n: commit_context(model, x, caches[n], state["key"], block, state[n]) for n in caches}
            found.append(x)
        whole = causal(state, model, steps=3, guidance=3.0)
    torch.testing.assert_close(whole, torch.cat(found, 1), rtol=1e-9, atol=1e-11)


def test_window_and_positions_of_a_long_video():
    seen = []

    def spy(latents, timestep, prompt_embeds, *, cache=None, positions=None, **_):
        seen.append((timestep[0, 0].item(), cache.positions, positions))
        kv = latents.flatten(2)[:, :, None]
        return latents, ((kv, kv, kv, kv),), ()

    state = {"noise": torch.zeros(1, 8, 1, 1, 1), "key": Key(seed=0, samples=(0,))}
    state |= {"prompt_embeds": torch.zeros(1, 1, 1), "negative_embeds": torch.zeros(1, 1, 1)}
    causal(state, spy, steps=1, guidance=2.0, window=5, sink=1)
    last = [call for call in seen if call[2] == (6, 7)]
    assert last == [(1000.0, (0, 4, 5), (6, 7))] * 2
    assert [call[0] for call in seen] == [1000.0, 1000.0, 0.0, 0.0] * 3 + [1000.0, 1000.0]


def test_a_trajectory_is_what_the_sampler_goes_through(randn):
    state = given(randn)
    states = Graph.from_spec("specs/ode_trajectory.yaml", steps=4, shift=3.0, guidance=2.0)(state, {"denoiser": decay})[
        "states"
    ]
    assert len(states) == 4
    assert torch.equal(states[-1], sample(state, decay, 4, shift=3.0, guidance=2.0))
    times = [step.timestep / 1000 for step in plan_ode(steps=4, shift=3.0)[0]] + [0.0]
    expected = state["noise"]
    for index, found in enumerate(states):
        expected = expected * (1 + 0.7 * (times[index + 1] - times[index]))
        torch.testing.assert_close(found, expected)


def test_given_frames_stand_at_timestep_0_and_stay(randn):
    state, first = given(randn), randn(2, 1, 1, 2, 2)
    seen = []

    def model(latents, timestep, prompt_embeds, **_):
        seen.append((latents[:, 0].clone(), timestep.clone()))
        return 0.7 * latents, (), ()

    spec = Graph.from_spec("specs/ode_trajectory.yaml", steps=3, shift=2.0, guidance=1.0)
    states = spec(state | {"initial_latents": first}, {"denoiser": model})["states"]
    free = spec(state, {"denoiser": decay})["states"]
    assert all(
        torch.equal(found[:, :1], first) and torch.equal(found[:, 1:], plain[:, 1:])
        for found, plain in zip(states, free, strict=True)
    )
    assert all(torch.equal(frame, first[:, 0]) for frame, _ in seen)
    assert [timestep.tolist() for _, timestep in seen] == [
        [[0.0, step.timestep]] * 2 for step in plan_ode(steps=3, shift=2.0)[0]
    ]
