"""`share_rollout`: on steps with the student's update, the phases after it take its sample instead of making their own."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import attrs
import pytest
import torch
from rich.console import Console

from sftk.core.graph import Graph
from sftk.functional.keys import Key
from sftk.runtime.bench_count import count_cases
from sftk.runtime.build import build_stage
from sftk.runtime.checkpoint import last_checkpoint
from sftk.runtime.loader import make_loader
from sftk.runtime.plan import plan_stage
from sftk.runtime.progress import TrainingProgress
from sftk.runtime.segments import compile_segments
from sftk.runtime.stage import StageRun
from sftk.runtime.step import TrainingStep
from sftk.runtime.tracking import MultiTracker
from sftk.spec.recipe import load_recipe
from sftk.spec.turns import cycle

CPU = torch.device("cpu")
SHARED = "share_rollout=true"
DOUBLE = tuple(f"models.{role}.dtype=fp64" for role in ("generator", "real_score", "fake_score"))


def make(recipe, *overrides):
    (stage,) = load_recipe(recipe, overrides)
    built = build_stage(stage, CPU, {})
    return stage, built, TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe, stage.path)))


def counted(built):
    """Calls of each role so far."""
    calls = Counter()
    for role, module in built.modules.items():
        module.register_forward_hook(lambda *_, role=role: calls.update([role]))
    return calls


def weights(built, role):
    return {name: tensor.clone() for name, tensor in built.modules[role].state_dict().items()}


@pytest.mark.parametrize("backward", ["graph", "replay"])
def test_the_critic_learns_from_the_students_own_sample(tiny, backward):
    """Against the step written out by hand: the student's graph, then the critic's loss on its x0 with the critic's key."""
    overrides = *DOUBLE, "batch.global=4", "batch.per_rank=2", f"phases.0.backward={backward}"
    _, _, step = make(tiny(), SHARED, *overrides)
    metrics = step(0)

    (plain,) = load_recipe(tiny(), overrides)
    other = build_stage(plain, CPU, {})
    loader = iter(make_loader(plain.recipe))
    critic = Graph.from_spec("specs/critic.yaml", shift=3.0)
    other.modules["generator"].requires_grad_(False)
    other.modules["real_score"].requires_grad_(False)
    total, count = 0.0, 0.0
    for micro in range(2):
        samples = (2 * micro, 2 * micro + 1)
        keys = {name: Key(seed=3, phase=name, update=0, samples=samples) for name in ("generator", "critic")}
        values = next(loader) | {"key": keys["generator"], "noise": keys["generator"].normal("noise", (6, 4, 8, 8))}
        inputs = {key: values[key] for key in ("noise", "prompt_embeds", "key")}
        rollout = Graph.from_spec("specs/rollout.yaml", steps=(1000, 500), shift=3.0)
        with torch.no_grad():
            made = rollout.run(inputs, {"denoiser": other.ports["generator"]})
        given = {key: made[key] for key in ("x0", "exit_from", "exit_to")}
        given |= {"prompt_embeds": values["prompt_embeds"], "key": keys["critic"]}
        out = critic.run(given, {"fake_score": other.ports["fake_score"]})
        out["loss"].backward()
        total, count = total + out["loss"].item(), count + out["loss_weight"].item()
    assert metrics["critic/loss"].item() == pytest.approx(total / count, rel=1e-6)
    found = torch.cat([p.grad.flatten() / count for p in other.modules["fake_score"].parameters() if p.grad is not None])
    assert metrics["critic/grad_norm"].item() == pytest.approx(found.norm().item(), rel=1e-6)


def test_the_very_same_sample_is_handed_on(tiny):
    stage, _, step = make(tiny(), SHARED, "batch.global=4", "batch.per_rank=2")
    generator, _, shared = stage.turns
    outputs, inputs = {}, {}
    step.run_turn(generator, 0, outputs, inputs)
    step.run_turn(shared, 0, outputs, inputs)
    assert len(outputs["critic"]) == 2
    for made, read, (mine, theirs) in zip(
        outputs["generator"], outputs["critic"], zip(inputs["generator"], inputs["critic"], strict=True), strict=True
    ):
        assert torch.equal(made["x0"], read["x0"])
        assert not read["x0"].requires_grad
        assert mine["prompt_embeds"] is theirs["prompt_embeds"]
        assert (mine["key"].phase, theirs["key"].phase) == ("generator", "critic")


def test_the_student_is_called_by_its_own_phase_alone(tiny):
    _, built, step = make(tiny(), SHARED, "phases.0.with.last_step_only=true", "phases.1.with.last_step_only=true")
    calls = counted(built)
    found = []
    for index in range(4):
        calls.clear()
        step(index)
        found.append(dict(calls))
    # Two blocks of two steps, and the first one's commit: 5 calls of the student for a rollout.
    assert found[0] == found[2] == {"generator": 5, "real_score": 2, "fake_score": 2}
    assert found[1] == found[3] == {"generator": 5, "fake_score": 1}


def test_steps_without_the_students_update_are_as_they_were(tiny):
    """The critic then rolls out with noise of its own: the same as without the option, for the same weights and data."""
    losses = []
    for overrides in ((), (SHARED,)):
        _, _, step = make(tiny(), *overrides)
        step.batches = itertools.repeat(next(step.batches))
        losses.append(step(1)["critic/loss"].item())
    assert losses[0] == losses[1]


def test_data_is_drawn_once_for_both(tiny):
    _, _, step = make(tiny(), SHARED)
    drawn, batches = [], step.batches
    step.batches = (drawn.append(1) or batch for batch in batches)
    counts = []
    for index in range(4):
        step(index)
        counts.append(len(drawn))
    assert counts == [1, 2, 3, 4]


def test_resumed_equals_uninterrupted(tiny, tmp_path):
    (stage,) = load_recipe(tiny(), [SHARED, "train.steps=5", "checkpoint.every=1"])

    def run(folder, last):
        shorter = attrs.evolve(stage, recipe=attrs.evolve(stage.recipe, train=attrs.evolve(stage.recipe.train, steps=last)))
        training = StageRun(shorter, tmp_path / folder, {})
        training.resume()
        with TrainingProgress(Console(file=io.StringIO()), enabled=False) as progress:
            progress.stage("tiny", last, training.step)
            training.train(MultiTracker([]), progress)
        return training.built

    whole = run("whole", 5)
    for last in (1, 2, 5):
        parts = run("parts", last)
    assert last_checkpoint(tmp_path / "parts") is not None
    for role in ("generator", "fake_score"):
        one, other = weights(whole, role), weights(parts, role)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_the_accumulation_is_changes_nothing(tiny):
    found = []
    for split in ((), ("batch.per_rank=1",)):
        _, built, step = make(tiny(), SHARED, *DOUBLE, *split)
        metrics = [step(index) for index in range(2)]
        found.append(([m["critic/loss"].double() for m in metrics], weights(built, "fake_score")))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-7, atol=1e-9)


SMALL = ("batch.global=2", "batch.per_rank=2", "latents.frames=6", "device=cpu", "eval=null", "compile=false")


@pytest.mark.parametrize("method", ["sid", "gan", "dmd2", "f_distill", "dmd_reward"])
def test_other_objectives(method):
    stage, built, step = make(f"recipes/digits/{method}.yaml", SHARED, *SMALL)
    assert [turn.shared for turn in stage.turns] == [False, True]
    calls = counted(built)
    metrics = step(0)
    assert all(value.isfinite() for value in metrics.values())
    taker = stage.turns[1].phase.name
    assert f"{taker}/loss" in metrics
    # Two blocks of four steps and a commit. The student's graph calls it as often as alone.
    assert calls["generator"] == 9
    assert "generator" not in built.turns[1].graph.ports


def test_compiled_segments_take_given_samples(tiny):
    losses = []
    for compiled in (False, True):
        _, built, step = make(tiny(), SHARED)
        if compiled:
            for name, graph in built.graphs.items():
                built.graphs[name] = compile_segments(graph, "eager")
        losses.append(step(0)["critic/loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_plan_and_bench_count_what_is_saved(tiny):
    (plain,), (shared,) = load_recipe(tiny()), load_recipe(tiny(), [SHARED])
    counts = count_cases(shared, ["critic", "critic.shared"])
    alone = [work.flops for (name, _), work in counts.items() if name == "critic"]
    (saved,) = [work.flops for (name, _), work in counts.items() if name == "critic.shared"]
    assert saved < min(alone)
    before, after = plan_stage(plain), plan_stage(shared)
    assert [phase.name for phase in after.phases] == ["generator", "critic", "critic.shared"]
    assert [phase.every for phase in after.phases] == [2, 2, 2]
    assert after.step_seconds < before.step_seconds
    assert before.step_seconds - after.step_seconds == pytest.approx((after.phases[1].seconds - after.phases[2].seconds) / 2)
    assert cycle(shared.turns) == {"generator": 1, "critic": 1, "critic.shared": 1}
