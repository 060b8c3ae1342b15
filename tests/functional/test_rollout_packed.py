"""A rollout whose cache keeps a byte for each key and value: close to the exact one, with the gradient of what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sftk.core import Graph, replayed
from sftk.errors import SpecError
from sftk.functional import Key
from sftk.runtime.plan_pass import pass_stage
from sftk.spec.recipe import load_recipe

STORAGES = pytest.mark.parametrize("storage", ["fp8", "int8"])


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()  # float64


def rollout(**params: Any) -> Graph:
    return Graph.from_spec("specs/rollout.yaml", **({"steps": (1000, 500), "frames_per_block": 2} | params))


@pytest.fixture
def state(randn):
    values = {"noise": randn(2, 6, 4, 4, 4), "prompt_embeds": randn(2, 4, 8)}
    return values | {"key": Key(seed=0, phase="generator", update=3, samples=(0, 1))}


@STORAGES
@pytest.mark.parametrize("options", [{}, {"rope": "relative"}, {"window": 4, "sink": 1, "rope": "relative"}], ids=str)
def test_it_is_close_to_the_exact_rollout(model, state, storage, options):
    with torch.no_grad():
        exact, packed = (
            rollout(kv_cache=kept, last_step_only=True, **options).run(state, {"denoiser": model})["x0"]
            for kept in ("full", storage)
        )
    assert torch.equal(packed[:, :2], exact[:, :2])  # the first block has no context
    lost = (packed - exact)[:, 2:].norm() / exact[:, 2:].norm()
    assert 0 < lost < {"int8": 0.003, "fp8": 0.015}[storage]


def gradients(model, graph, state, pull_back=lambda: None):
    model.zero_grad()
    found = graph.run(state, {"denoiser": model})
    weights = torch.linspace(-1, 1, found["x0"].numel(), dtype=torch.float64).view_as(found["x0"])
    (found["x0"] * weights).sum().backward()
    pull_back()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@STORAGES
@pytest.mark.parametrize("context_gradient", ["detach", "straight_through"])
def test_gradients_agree_between_the_modes_of_backward(make_model, state, storage, context_gradient):
    model = make_model()
    graph = rollout(kv_cache=storage, context_gradient=context_gradient)
    plain = gradients(model, graph, state)
    played, tape = replayed(graph)
    again = gradients(model, played, state, tape.pull_back)
    blocks = list(model.blocks)
    for index, block in enumerate(blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    kept = {name.replace("._checkpoint_wrapped_module", ""): value for name, value in gradients(model, graph, state).items()}
    assert len(plain) > 20
    for other in (again, kept):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-11)


def test_straight_through_sends_the_gradient_that_an_exact_cache_sends(make_model, state):
    """Not bit by bit, since values differ, but the part that comes through the cache is there."""
    model = make_model()
    found = {
        (kept, how): torch.cat(
            [g.flatten() for g in gradients(model, rollout(kv_cache=kept, context_gradient=how), state).values()]
        )
        for kept in ("full", "int8")
        for how in ("detach", "straight_through")
    }
    through = {kept: found[kept, "straight_through"] - found[kept, "detach"] for kept in ("full", "int8")}
    assert through["full"].norm() > 0.01 * found["full", "detach"].norm()
    assert (through["int8"] - through["full"]).norm() < 0.1 * through["full"].norm()


def test_the_planner_sees_the_smaller_cache():
    """Of fp32 keys with heads of 32, packed ones take (32 + 4) / 128."""
    sizes = []
    for kept in ("full", "int8"):
        overrides = [f"phases.critic.with.kv_cache={kept}", "latents.frames=12", "batch.global=1"]
        (stage,) = load_recipe("recipes/dmd.yaml", overrides)
        sizes.append(next(phase for phase in pass_stage(stage).phases if phase.name == "critic").caches)
    text = 2 * 4 * 4 * 96 * 4  # keys and values, layers, tokens, width, bytes
    assert sizes[1] - text == pytest.approx((sizes[0] - text) * 36 / 128)


def test_a_wrong_name_is_an_error():
    with pytest.raises(SpecError, match="kv_cache"):
        load_recipe("recipes/dmd.yaml", ["phases.critic.with.kv_cache=fp4"])
    with pytest.raises(SpecError, match="share_rollout: 'critic' rolls out with kv_cache: 'int8', 'generator' with 'full'"):
        load_recipe("recipes/dmd.yaml", ["phases.critic.with.kv_cache=int8", "share_rollout=true"])
