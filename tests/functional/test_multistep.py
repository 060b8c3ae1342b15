"""UniPC and DPM++ as values: what diffusers' own loop gives; and a better order than Euler's method."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch

from sftk.core import Graph
from sftk.errors import SftkError, SpecError
from sftk.functional import Key, plan_ode, solver_step
from sftk.functional.multistep import start_multistep

diffusers = pytest.importorskip("diffusers")
solvers = pytest.mark.parametrize("solver", ["unipc", "dpm++"])


def scheduler_of(solver: str, shift: float):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    kind = diffusers.UniPCMultistepScheduler if solver == "unipc" else diffusers.DPMSolverMultistepScheduler
    return kind(**flow)


@solvers
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_the_loop_of_a_diffusers_pipeline(make_model, randn, solver, guidance):
    """As `WanPipeline.__call__` samples: the scheduler's timesteps, both passes, guidance, a step in float32."""
    model = make_model(torch.float32)
    state = {"noise": randn(2, 3, 4, 4, 4).float()}
    state |= {name: randn(2, 4, 8).float() for name in ("prompt_embeds", "negative_embeds")}
    scheduler, latents = scheduler_of(solver, 5.0), state["noise"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(6)
        for time in scheduler.timesteps:
            times = time.expand(2).float()
            cond, uncond = (model(latents, times, state[name])[0] for name in ("prompt_embeds", "negative_embeds"))
            flow = cond if guidance == 1.0 else uncond + guidance * (cond - uncond)
            latents = scheduler.step(flow, time, latents, return_dict=False)[0]
        graph = Graph.from_spec("specs/sample_ode.yaml", steps=6, shift=5.0, guidance=guidance, solver=solver)
        found = graph(state, {"denoiser": model})["x0"]
    torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-5)


@solvers
def test_converges_faster_than_euler(randn, solver):
    """dx / d sigma = 0.7 x, from sigma 1 to 0."""
    state = {"noise": randn(1, 2, 1, 2, 2), "prompt_embeds": torch.ones(1, 1, 1), "negative_embeds": torch.zeros(1, 1, 1)}

    def decay(latents, timestep, prompt_embeds, **_):
        return 0.7 * latents, (), ()

    def error(name):
        graph = Graph.from_spec("specs/sample_ode.yaml", steps=24, shift=3.0, guidance=1.0, solver=name)
        return (graph(state, {"denoiser": decay})["x0"] - math.exp(-0.7) * state["noise"]).abs().max()

    assert error(solver) < error("euler") / 10


@solvers
def test_a_solver_is_a_value(randn, solver):
    steps, first = plan_ode(steps=4, shift=5.0, solver=solver)
    noisy, flows = randn(1, 3, 4, 2, 2), [randn(1, 3, 4, 2, 2) for _ in steps]

    def run(noisy, state, start):
        for step, flow in zip(steps[start:], flows[start:], strict=True):
            noisy, state = solver_step(noisy, flow, step, state)
        return noisy

    halfway, second = solver_step(noisy, flows[0], steps[0], first)
    halfway, third = solver_step(halfway, flows[1], steps[1], second)
    whole = run(noisy, first, 0)
    assert whole.dtype == noisy.dtype
    assert torch.equal(run(halfway, third, 2), whole)
    assert torch.equal(run(halfway, third, 2), whole)
    assert torch.equal(run(noisy, first, 0), whole)


@solvers
def test_each_block_begins_anew(make_model, randn, solver):
    """A block's first step has no past: a video of one block is the beginning of a longer one."""
    model = make_model()
    state = {"noise": randn(1, 4, 4, 4, 4), "prompt_embeds": randn(1, 4, 8), "negative_embeds": randn(1, 4, 8)}
    state["key"] = Key(seed=0)
    graph = Graph.from_spec("specs/sample_causal.yaml", steps=3, frames_per_block=2, guidance=2.0, solver=solver)
    with torch.no_grad():
        whole = graph(state, {"denoiser": model})["x0"]
        short = graph(state | {"noise": state["noise"][:, :2]}, {"denoiser": model})["x0"]
        alone = Graph.from_spec("specs/sample_ode.yaml", steps=3, guidance=2.0, solver=solver)
        bidirectional = alone(state | {"noise": state["noise"][:, :2]}, {"denoiser": model})["x0"]
    torch.testing.assert_close(whole[:, :2], short, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(short, bidirectional, rtol=1e-6, atol=1e-8)


def test_what_is_wrong_is_named(monkeypatch):
    with pytest.raises(SpecError, match=r"takes one of 'euler', 'unipc', 'dpm\+\+', found the string 'unipcc'"):
        Graph.from_spec("specs/sample_ode.yaml", solver="unipcc")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SftkError, match=r"the solver 'unipc' needs the package 'diffusers'; install it with `pip install"):
        start_multistep("unipc", 4, 5.0)
