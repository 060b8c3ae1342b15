"""MeanFlow, sCM and rewards in the runner: a few updates on digits bring what each is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftk.core.graph import Graph
from sftk.data.sources import source
from sftk.functional import Key, interpolate
from sftk.functional.schedule import frame_timesteps
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.step import TrainingStep
from sftk.spec.recipe import load_recipe

SMALL = ("latents.frames=3", "batch.global=8", "track.tensorboard=false", "eval.enabled=false", "device=cpu", "compile=false")
HELD_OUT = 16


def held_out() -> dict[str, Any]:
    """Clips, prompts and draws that training does not see."""
    data = source("digits")
    clips = data.build(frames=3, channels=4, height=8, width=8, seed=99, options={"split": "test"})
    batch = {k: v for k, v in data.collate([clips[i] for i in range(HELD_OUT)]).items() if k in data.keys}
    key = Key(seed=99, phase="test", samples=tuple(range(HELD_OUT)))
    return batch | {"key": key, "noise": key.normal("start", (3, 4, 8, 8)), "labels": batch["digit"]}


def train(recipe: str, steps: int, judge, *overrides: str) -> tuple[float, float, dict[str, Any]]:
    """`judge(built)` before and after so many steps, and the last step's metrics."""
    (stage,) = load_recipe(recipe, [*SMALL, f"train.steps={steps}", *overrides])
    built = build_stage(stage, torch.device("cpu"), {})
    run_step, metrics = TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe))), {}
    with torch.no_grad():
        before = judge(built)
    for step in range(steps):
        metrics = run_step(step)
    with torch.no_grad():
        return before, judge(built), metrics


START = 0.9
"""Sigma at which the held-out noisy clips are."""


def noisy_clips() -> torch.Tensor:
    values = held_out()
    return interpolate(values["latents"], values["noise"], torch.full((HELD_OUT, 3), START))


def miss(built, **more: Any) -> float:
    """Squared distance of one step of the student, all the way down, from where small steps of the teacher's flow end."""
    embeds, x = held_out()["prompt_embeds"], noisy_clips()
    flow = built.ports["denoiser"](x, frame_timesteps(x, 1000 * START), embeds, **more)[0]
    found = x - START * flow
    for i in range(18):
        x = x - START / 18 * built.ports["teacher"](x, frame_timesteps(x, 1000 * START * (1 - i / 18)), embeds)[0]
    return (found - x).square().mean().item()


@pytest.mark.parametrize("method", ["meanflow", "scm"])
def test_a_long_step_comes_nearer_to_the_end_of_the_path(method: str):
    own = {"meanflow": ("empty=0.0",), "scm": ("warmup=10",)}[method]
    overrides = ["eval=null", "optimizers.denoiser.warmup=5", "optimizers.denoiser.schedule=constant"]
    overrides += [f"phases.0.with.{option}" for option in ("guidance=1.0", *own)]
    more = {"interval": torch.full((HELD_OUT, 3), 1000 * START)} if method == "meanflow" else {}
    before, after, metrics = train(f"recipes/digits/{method}.yaml", 30, lambda built: miss(built, **more), *overrides)
    assert after < 0.8 * before
    assert f"{method}/loss" in metrics


@pytest.mark.slow
def test_a_reward_rises_when_it_is_trained_for():
    spec = Graph.from_spec("specs/rollout.yaml", shift=3.0, last_step_only=True).subgraph(["x0"])
    reward = Graph.from_spec("specs/reward.yaml")

    def score(built) -> float:
        values = held_out()
        x0 = spec(values, {"denoiser": built.ports["generator"]})["x0"]
        return reward({"x0": x0, "labels": values["labels"]}, built.ports)["score"].mean().item()

    before, after, metrics = train(
        "recipes/digits/dmd_reward.yaml", 20, score, "eval=null", "phases.generator.with.reward_scale=5.0"
    )
    assert after > before + 0.05
    assert "generator/score" in metrics


def test_built_in_roles_are_frozen_and_leave_no_checkpoint(tmp_path):
    from sftk.runtime.stage import StageRun

    (stage,) = load_recipe("recipes/digits/dmd_reward.yaml", [*SMALL, "train.steps=1", "eval=null", "ema.generator.start=0"])
    run = StageRun(stage, tmp_path, {})
    before = [p.clone() for p in run.built.ports["reward"].parameters()]
    TrainingStep(stage.recipe, run.built, iter(run.loader))(0)
    saved = run.save()
    assert {path.name for path in saved.glob("*.safetensors")} == {
        "generator.safetensors", "generator.ema.safetensors", "fake_score.safetensors",
        "generator.optimizer.safetensors", "fake_score.optimizer.safetensors",
    }  # fmt: skip
    assert "reward" not in run.built.modules
    after = list(run.built.ports["reward"].parameters())
    assert all(torch.equal(a, b) and not b.requires_grad and b.grad is None for a, b in zip(before, after, strict=True))
