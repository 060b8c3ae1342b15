"""`backward: replay` in a run: the same training, memory that does not grow with the blocks."""

from __future__ import annotations

import pytest
import torch

from sftk.functional import apart
from sftk.models import past
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.plan_pass import pass_stage
from sftk.runtime.step import TrainingStep
from sftk.spec.recipe import load_recipe

REPLAY = "phases.generator.backward=replay"


DOUBLE = tuple(f"models.{role}.dtype=fp64" for role in ("generator", "real_score", "fake_score"))


def trained(recipe, *overrides, steps=3):
    (stage,) = load_recipe(recipe, overrides)
    built = build_stage(stage, torch.device("cpu"), {})
    step = TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe)))
    metrics = [step(index) for index in range(steps)]
    return metrics, {f"{r}.{n}": t for r, module in built.modules.items() for n, t in module.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("batch.per_rank=1", "models.generator.checkpoint=full"),
        ("phases.generator.with.context_gradient=straight_through",),
    ],
    ids=["plain", "accumulated", "straight_through"],
)
def test_training_is_the_same(tiny, changes):
    recipe = tiny()
    (plain, weights), (found, replayed) = (trained(recipe, *changes, *DOUBLE, *more) for more in ((), (REPLAY,)))
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(replayed, weights, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_training_is_the_same(tiny):
    recipe = tiny()  # in float32: torch 2.11's compiled attention on the CPU has no backward pass in float64
    (plain, _), (found, _) = (trained(recipe, "compile=true", *more, steps=1) for more in ((), (REPLAY,)))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_the_objectives_that_differentiate_scores_too():
    """SiD's gradient runs through both score models before it arrives at the rollout."""
    small = ("latents.frames=6", "batch.global=2", "eval.enabled=false")
    (plain, weights), (found, replayed) = (
        trained("recipes/digits/sid.yaml", *small, *DOUBLE, *more, steps=1) for more in ((), (REPLAY,))
    )
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(replayed, weights, rtol=1e-9, atol=1e-12)


def generator_pass(frames, *overrides):
    steps = [f"phases.{phase}.with.steps=[1000, 500]" for phase in ("generator", "critic")]
    (stage,) = load_recipe("recipes/dmd.yaml", [f"latents.frames={frames}", "batch.global=4", *steps, *overrides])
    (found,) = pass_stage(stage, turns=stage.turns[:1]).phases
    assert found.name == "generator"
    return found


WINDOW = "phases.generator.with.output_frames=21"
DEEP = (
    "models.generator.size={dim: 96, ffn_dim: 384, num_heads: 3, num_layers: 16, in_dim: 4, out_dim: 4, freq_dim: 64, "
    "text_dim: 32, text_len: 4}",
    "models.generator.weights=null",
    "models.generator.checkpoint=full",
)


def test_memory_grows_with_the_cache_alone():
    """21 frames to 63 of which 21 are judged, on a CPU. A layer joins its context; with sixteen layers that is little."""
    short, long = (generator_pass(frames, *DEEP, WINDOW, REPLAY) for frames in (21, 63))
    grown, cache = long.peak() - short.peak(), long.caches - short.caches
    assert 0.9 * cache < grown < 1.15 * cache


@pytest.mark.parametrize("kind", ["none", "selective"])
def test_where_long_contexts_are_not_joined_it_grows_by_no_more(monkeypatch, kind):
    """As with FlashAttention, whose bound lies here behind the 18 frames that a rollout of 21 has in its cache."""
    tokens = 16  # of a frame
    monkeypatch.setattr(past, "APART_FROM", 18 * tokens)
    monkeypatch.setattr(apart, "PIECE", 18 * tokens // 2)
    flash = (*DEEP, WINDOW, REPLAY, "models.generator.backend=flash", f"models.generator.checkpoint={kind}")
    short, long = (generator_pass(frames, *flash) for frames in (21, 63))
    grown, cache = long.peak() - short.peak(), long.caches - short.caches
    assert grown <= cache
    monkeypatch.setattr(past, "APART_FROM", 100 * tokens)
    joined = generator_pass(63, *flash)
    assert long.peak() < joined.peak()
    assert long.work.attention == joined.work.attention
    assert long.work.attention_backward == joined.work.attention_backward


def test_blocks_before_the_judged_frames_do_not_run_again():
    plain, played = (generator_pass(30, WINDOW, *more).calls["generator"] for more in ((), (REPLAY,)))
    assert played == plain + 7


def test_activations_of_one_block_are_alive_at_a_time():
    cache = generator_pass(21).caches
    plain, replayed = (generator_pass(21, *more).peak() - cache for more in ((), (REPLAY,)))
    assert replayed < 0.4 * plain


def test_plan_counts_the_passes_that_are_made_again():
    plain, played = generator_pass(9), generator_pass(9, REPLAY)
    assert played.calls["generator"] == plain.calls["generator"] + 3  # one for the exit step of each block
    assert played.work.attention_backward == plain.work.attention_backward
    assert played.work.flops > plain.work.flops
