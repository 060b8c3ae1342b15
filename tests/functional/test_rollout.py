"""Laws of the rollout: caches against masks, gradients, splits of the batch, windows, exits."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from sftk.core import Graph, replayed
from sftk.errors import ShapeError, SpecError
from sftk.functional import (
    Block,
    Key,
    KVCache,
    Layout,
    RecordedKey,
    append,
    commit_context,
    crop_length,
    exit_step,
    plan_rollout,
    predict_flow,
    predict_flow_teacher_forced,
    window_context,
)
from sftk.functional.predict import toy_denoiser
from sftk.functional.schedule import timestep_to_sigma
from sftk.models.rope import rotate

CACHES: dict[str, dict[str, Any]] = {
    "full": {},
    "windowed": {"window": 4},
    "sink": {"window": 5, "sink": 1},
    "relative": {"window": 5, "sink": 1, "rope": "relative"},
}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def rollout(**params: Any) -> Graph:
    return Graph.from_spec("specs/rollout.yaml", **({"steps": (1000, 750, 500), "frames_per_block": 2} | params))


def state(randn, batch: int = 2, frames: int = 6, seed: int = 0) -> dict[str, Any]:
    return {
        "noise": randn(batch, frames, 4, 4, 4),
        "prompt_embeds": randn(batch, 4, 8),
        "key": Key(seed=seed, phase="generator", update=3, samples=tuple(range(batch))),
    }


class Spy:
    """A denoiser that notes what it is told."""

    def __init__(self, inner: Any = toy_denoiser):
        self.inner, self.calls = inner, []

    def __call__(self, latents, timestep, prompt_embeds, *, cache=None, layout=None, positions=None, features_at=()):
        assert (timestep == timestep[0, 0]).all()
        self.calls.append(
            SimpleNamespace(
                timestep=timestep[0, 0].item(),
                seen=cache.positions,
                positions=positions,
                grad=torch.is_grad_enabled(),
                latents=latents.detach(),
            )
        )
        return self.inner(latents, timestep, prompt_embeds, cache=cache, layout=layout, positions=positions)


def blocks_of(lengths: tuple[int, ...]) -> list[Block]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Block(index=i, start=s, offset=s, frames=n) for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]


def cached_flows(model, clean, noisy, timestep, embeds, lengths, *, rope="absolute", **window):
    """Each block's flow given the cache, clean blocks committed one by one."""
    cache, flows = KVCache(rope=rope), []
    for block in blocks_of(lengths):
        span = slice(block.start, block.start + block.frames)
        cache = window_context(cache, block, **window)
        flow, _, _ = model(noisy[:, span], timestep[:, span], embeds, cache=cache, positions=block.positions)
        flows.append(flow)
        cache = commit_context(model, clean[:, span], cache, Key(seed=0), block, embeds)
    return torch.cat(flows, 1)


def same(found: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# Caches against masks


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize(("lengths", "first"), [((2, 2, 2), False), ((1, 2, 2, 2), True), ((1, 1, 1), False)])
def test_cached_flow_equals_teacher_forcing_in_one_pass(model, randn, lengths, first, rope):
    clean, noisy = randn(2, sum(lengths), 4, 4, 4), randn(2, sum(lengths), 4, 4, 4)
    timestep = (torch.rand(2, len(lengths), dtype=torch.float64) * 1000).repeat_interleave(torch.tensor(lengths), 1)
    embeds = randn(2, 4, 8)
    cached = cached_flows(model, clean, noisy, timestep, embeds, lengths, rope=rope)
    layout = Layout(kind="teacher_forcing", blocks=lengths)
    both, times = torch.cat([clean, noisy], 1), torch.cat([torch.zeros_like(timestep), timestep], 1)
    once = model(both, times, embeds, layout=layout, positions=layout.positions)[0][:, sum(lengths) :]
    same(cached, once)
    forced = predict_flow_teacher_forced(
        model, noisy, timestep, clean, embeds, frames_per_block=lengths[-1], independent_first_frame=first
    )
    same(forced, once)
    assert (once - model(noisy, timestep, embeds)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [(2, 2, 2, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize(
    ("window", "sink", "rope"),
    # With a sink a relative cache closes the gap that evicted frames leave: see the test of relative positions.
    [
        *[(window, sink, "absolute") for window, sink in ((None, 0), (4, 0), (5, 0), (5, 1), (6, 2))],
        *[(window, 0, "relative") for window in (None, 4, 5)],
    ],
)
def test_cached_flow_equals_one_block_causal_pass(model, randn, lengths, window, sink, rope):
    """A cache and a layout mean the same by window and sink."""
    frames = sum(lengths)
    clean, embeds, timestep = randn(1, frames, 4, 4, 4), randn(1, 4, 8), torch.zeros(1, frames, dtype=torch.float64)
    cached = cached_flows(model, clean, clean, timestep, embeds, lengths, window=window, sink=sink, rope=rope)
    once = predict_flow(
        model,
        clean,
        timestep,
        embeds,
        frames_per_block=2,
        independent_first_frame=lengths[0] == 1,
        window=window,
        sink=sink,
    )
    same(cached, once)
    if window is not None:
        full = predict_flow(model, clean, timestep, embeds, frames_per_block=2, independent_first_frame=lengths[0] == 1)
        assert (once - full).abs().max() > 1e-4


def test_relative_positions_close_the_gap_that_eviction_leaves(model, randn):
    """With a sink, a relative cache must equal an absolute one whose kept frames stand at 0, 1, 2 ..."""
    clean, embeds, zero = randn(1, 8, 4, 4, 4), randn(1, 4, 8), torch.zeros(1, 2, dtype=torch.float64)
    cache = KVCache(rope="relative")
    keys = []
    for block in blocks_of((2, 2, 2)):
        span = clean[:, block.start : block.start + 2]
        kv = model(span, zero, embeds, cache=KVCache(rope="relative"))[1]
        keys.append(kv)
        cache = append(cache, kv, block.positions)
    block = blocks_of((2, 2, 2, 2))[3]
    seen = window_context(cache, block, window=5, sink=1)
    assert seen.positions == (0, 4, 5)
    flow = model(clean[:, 6:], zero, embeds, cache=seen, positions=block.positions)[0]
    placed = KVCache()
    for kv, place in zip((keys[0], keys[2]), ((0, 7), (1, 2)), strict=True):
        turned = []
        for k, v, *text in kv:
            cos, sin = model._rope(clean, None, place, 2, 2, 2)[0]
            turned.append((rotate(k, cos, sin), v, *text))
        placed = append(placed, tuple(turned), place)
    placed = window_context(placed, block, window=5, sink=1)
    same(flow, model(clean[:, 6:], zero, embeds, cache=placed, positions=(3, 4))[0])


def test_rollout_over_a_full_cache_sees_no_later_block(model, randn):
    given = state(randn)
    other = given | {"noise": torch.cat([given["noise"][:, :4], randn(2, 2, 4, 4, 4)], 1)}
    first, second = (rollout()(s, {"denoiser": model})["x0"] for s in (given, other))
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.equal(first[:, 4:], second[:, 4:])


# Gradients


def checkpointed(model, mode: str):
    model = copy.deepcopy(model)

    def policy(context, op, *args, **kwargs):
        keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    extra = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if mode == "selective" else {}
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block, **extra)
    return model


def gradients(model, given: dict[str, Any], **params: Any):
    model.zero_grad()
    out = rollout(**params)(given, {"denoiser": model})
    weight = torch.linspace(-1, 1, out["x0"].numel(), dtype=torch.float64).view_as(out["x0"])
    (out["x0"] * weight).sum().backward()
    return out["x0"].detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("context_gradient", ["detach", "straight_through"])
@pytest.mark.parametrize("cache", CACHES)
def test_gradients_agree_with_and_without_checkpointing(model, randn, cache, context_gradient, mode):
    given = state(randn, frames=8)
    params = {"context_gradient": context_gradient, "context_noise": 50.0, "same_step_across_blocks": False, **CACHES[cache]}
    plain, wrapped = (gradients(m, given, **params) for m in (copy.deepcopy(model), checkpointed(model, mode)))
    same(wrapped[0], plain[0])
    for found, expected in zip(wrapped[1], plain[1], strict=True):
        same(found, expected)
    assert max(g.abs().max() for g in plain[1]) > 1e-3


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("extra", [{}, {"grad_frames": 4}, {"output_frames": 3}, {"independent_first_frame": True}], ids=str)
@pytest.mark.parametrize("context_gradient", ["detach", "straight_through"])
@pytest.mark.parametrize("cache", CACHES)
def test_replay_gives_the_gradient_of_the_graph(model, randn, cache, context_gradient, extra, mode):
    given = state(randn, frames=9 if "independent_first_frame" in extra else 8)
    if not extra:
        given["initial_latents"] = randn(2, 2, 4, 4, 4)
    params = (
        {"context_gradient": context_gradient, "context_noise": 50.0, "same_step_across_blocks": False} | CACHES[cache] | extra
    )
    x0, expected = gradients(copy.deepcopy(model), given, **params)
    played, tape = replayed(rollout(**params))
    wrapped = checkpointed(model, mode) if mode == "full" else copy.deepcopy(model)
    out = played(given, {"denoiser": wrapped})
    assert torch.equal(out["x0"], x0)
    weight = torch.linspace(-1, 1, x0.numel(), dtype=torch.float64).view_as(x0)
    (out["x0"] * weight).sum().backward()
    assert all(p.grad is None for p in wrapped.parameters())
    tape.pull_back()
    for parameter, gradient in zip(wrapped.parameters(), expected, strict=True):
        same(parameter.grad, gradient)


def test_straight_through_differs_from_detach_in_gradient_alone(model, randn):
    given = state(randn)
    detached, through = (gradients(model, given, context_gradient=c) for c in ("detach", "straight_through"))
    assert torch.equal(detached[0], through[0])
    assert max((a - b).abs().max() for a, b in zip(detached[1], through[1], strict=True)) > 1e-3


def test_detach_cuts_blocks_and_straight_through_joins_them(model, randn):
    """With one step there is no other way from an earlier block's noise to a later block but the cache."""
    for context_gradient, joined in (("detach", False), ("straight_through", True)):
        given = state(randn)
        given["noise"].requires_grad_()
        x0 = rollout(steps=(1000,), context_gradient=context_gradient)(given, {"denoiser": model})["x0"]
        (grad,) = torch.autograd.grad(x0[:, 4:].square().sum(), given["noise"])
        assert bool(grad[:, :4].any()) is joined
        assert grad[:, 4:].abs().max() > 0


def test_straight_through_is_the_pullback_of_the_exit_step(model, randn):
    """Block 1's gradient to its context is delivered to the keys and values of block 0's exit step."""
    given = state(randn, frames=4)
    params = list(model.parameters())
    x0 = rollout(steps=(1000,), context_gradient="straight_through")(given, {"denoiser": model})["x0"]
    found = torch.autograd.grad(x0[:, 2:].square().sum(), params, allow_unused=True)

    (first, second), *_ = plan_rollout(given["key"], given["noise"], steps=(1000,), frames_per_block=2)
    embeds, noise = given["prompt_embeds"], given["noise"]
    x0_first, kv = exit_step(model, noise[:, :2], first, KVCache(), embeds)
    context = commit_context(model, x0_first, KVCache(), given["key"], first, embeds)
    leaves = [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in context.chunks[0].layers]
    cut = append(KVCache(), [(k, v, *t) for (k, v), t in zip(leaves, context.text, strict=True)], first.positions)
    x0_second, _ = exit_step(model, noise[:, 2:], second, cut, embeds)
    flat = [x for pair in leaves for x in pair]
    own_and_keys = torch.autograd.grad(x0_second.square().sum(), [*params, *flat])
    own, cotangents = own_and_keys[: len(params)], own_and_keys[len(params) :]
    through = torch.autograd.grad([x for layer in kv for x in layer[:2]], params, cotangents, allow_unused=True)
    for a, b, c in zip(found, own, through, strict=True):
        same(a, b if c is None else b + c)


def test_text_keys_and_values_carry_gradient_in_the_exit_step(model, randn):
    given = state(randn)
    given["prompt_embeds"].requires_grad_()
    x0 = rollout(steps=(1000, 500), last_step_only=True)(given, {"denoiser": model})["x0"]
    for span in (slice(0, 2), slice(4, 6)):
        (grad,) = torch.autograd.grad(x0[:, span].sum(), given["prompt_embeds"], retain_graph=True)
        assert grad.abs().max() > 1e-4


def test_reused_text_keys_equal_fresh_ones(model, randn):
    """The no-grad steps take text keys from the cache, the gradient steps compute them: the values must not differ."""
    given = state(randn)
    with_grad = rollout()(given, {"denoiser": model})["x0"]
    with torch.no_grad():
        without = rollout()(given, {"denoiser": model})["x0"]
    same(with_grad.detach(), without)


def test_append_twice_from_one_parent_gives_independent_values(model, randn):
    embeds, zero = randn(1, 4, 8), torch.zeros(1, 2, dtype=torch.float64)
    kvs = [model(randn(1, 2, 4, 4, 4), zero, embeds, cache=KVCache())[1] for _ in range(3)]
    parent = append(KVCache(), kvs[0], (0, 1))
    before = [x.clone() for x in parent.layer(0)]
    left, right = append(parent, kvs[1], (2, 3)), append(parent, kvs[2], (2, 3))
    assert parent.frames == 2
    assert left.positions == right.positions == (0, 1, 2, 3)
    assert not torch.equal(left.layer(0)[0], right.layer(0)[0])
    assert torch.equal(left.layer(0)[0][:, :8], right.layer(0)[0][:, :8])
    for now, then in zip(parent.layer(0), before, strict=True):
        assert torch.equal(now, then)


def test_backward_works_after_later_commits(model, randn):
    """A graph that saved the parent cache can run backward when the cache has grown."""
    given = state(randn, frames=4)
    (first, second), *_ = plan_rollout(given["key"], given["noise"], steps=(1000,), frames_per_block=2)
    embeds = given["prompt_embeds"]
    cache = commit_context(model, given["noise"][:, :2], KVCache(), given["key"], first, embeds)
    x0, _ = exit_step(model, given["noise"][:, 2:], second, cache, embeds)
    params = list(model.parameters())
    early = torch.autograd.grad(x0.square().sum(), params, retain_graph=True)
    grown = commit_context(model, x0, cache, given["key"], second, embeds, commit_last=True)
    commit_context(model, x0 * 2, cache, given["key"], second, embeds, commit_last=True)
    assert grown.frames == 4
    late = torch.autograd.grad(x0.square().sum(), params)
    assert all(torch.equal(a, b) for a, b in zip(early, late, strict=True))


# What gradient flows where


def test_lead_steps_and_commits_run_without_grad():
    spy = Spy()
    given = {"noise": torch.randn(1, 6, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    rollout(steps=(1000, 500), last_step_only=True, shift=1.0)(given, {"denoiser": spy})
    assert [(c.timestep, c.grad, c.positions) for c in spy.calls] == [
        *((1000.0, False, (0, 1)), (500.0, True, (0, 1)), (0.0, False, (0, 1))),
        *((1000.0, False, (2, 3)), (500.0, True, (2, 3)), (0.0, False, (2, 3))),
        *((1000.0, False, (4, 5)), (500.0, True, (4, 5))),
    ]
    assert [c.seen for c in spy.calls] == [(), (), (), *[(0, 1)] * 3, *[(0, 1, 2, 3)] * 2]


@pytest.mark.parametrize(("grad_frames", "blocks"), [(None, 3), (6, 3), (5, 2), (4, 2), (2, 1)])
def test_grad_frames(model, randn, grad_frames, blocks):
    given = state(randn)
    given["noise"].requires_grad_()
    out = rollout(steps=(1000,), grad_frames=grad_frames)(given, {"denoiser": model})
    flags = [False] * (6 - 2 * blocks) + [True] * (2 * blocks)
    assert out["gradient_mask"].tolist() == [flags] * 2
    for index in range(3):
        x0 = out["x0"][:, 2 * index : 2 * index + 2]
        grads = [None]
        if out["x0"].requires_grad:
            grads = torch.autograd.grad(x0.sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in grads) is flags[2 * index]


@pytest.mark.parametrize("option", ["grad_frames", "output_frames"])
def test_a_rollout_that_nothing_could_learn_from(option):
    with pytest.raises(
        SpecError, match=f"the last 1 frames hold no whole block of 2, so nothing carries gradient @ .*{option}"
    ):
        rollout(**{option: 1})


@pytest.mark.parametrize(
    ("given", "options", "flags"),
    [
        (0, {"output_frames": 4}, [True] * 4),
        (0, {"output_frames": 3}, [False, True, True]),
        (0, {"output_frames": 4, "grad_frames": 2}, [False, False, True, True]),
        (2, {"output_frames": 7}, [False, *[True] * 6]),
        (2, {"output_frames": 50}, [False, False, *[True] * 6]),
    ],
)
def test_only_frames_that_are_judged_carry_gradient(randn, given, options, flags):
    initial = randn(1, given, 4, 2, 2) if given else None
    plan = plan_rollout(Key(seed=0), randn(1, 6, 4, 2, 2), initial, steps=(1000,), frames_per_block=2, **options)
    blocks, mask = plan[0], plan[4]
    assert mask.tolist() == [flags]
    assert [block.grad for block in blocks for _ in range(2)][-len(flags) :] == flags[-6:]
    assert sum(block.grad for block in blocks) == sum(flags) // 2


def test_steps_between_the_entries_of_a_table_are_read_with_the_tables_sigma():
    """An unwarped list falls between the entries of a shifted table, where its sigma is another than the timestep's."""
    options: dict[str, Any] = {"steps": (1000.0, 137.3, 71.9), "warp": False, "shift": 5.0, "last_step_only": True}
    spy = Spy()
    given = {"noise": torch.randn(1, 2, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    x0 = rollout(**options, schedule="table")(given, {"denoiser": spy})["x0"]

    def read(call: SimpleNamespace) -> torch.Tensor:
        sigma = timestep_to_sigma(torch.tensor([call.timestep]), "table", 5.0)
        assert call.timestep == 1000 or (sigma - call.timestep / 1000).abs() > 5e-4
        flow = toy_denoiser(call.latents, torch.full((1, 2), call.timestep), torch.zeros(1, 2, 8))[0]
        return call.latents - sigma * flow

    first, second, last = spy.calls
    for before, after, index in ((first, second, 0), (second, last, 1)):
        sigma = timestep_to_sigma(torch.tensor([after.timestep]), "table", 5.0)
        noise = given["key"].normal(f"renoise_b0_s{index}", (2, 4, 2, 2))
        same(after.latents, (1 - sigma) * read(before) + sigma * noise, rtol=0, atol=1e-6)
    same(x0, read(last), rtol=0, atol=1e-6)


def test_gradient_mask_counts_given_frames(randn):
    given = state(randn)
    *_, mask = plan_rollout(
        given["key"], given["noise"], randn(2, 2, 4, 4, 4), steps=(1000,), frames_per_block=2, grad_frames=4
    )
    assert mask.tolist() == [[False] * 4 + [True] * 4] * 2


# Exits


def test_per_block_exits():
    noise = torch.zeros(1, 12, 4, 2, 2)
    key = RecordedKey(choices={"exit": (2, 0, 1, 2)})
    options = {"steps": (1000, 750, 500), "shift": 5.0, "frames_per_block": 3}
    blocks, _, exit_from, exit_to, _ = plan_rollout(key, noise, same_step_across_blocks=False, **options)
    assert [len(b.lead) for b in blocks] == [2, 0, 1, 2]
    assert [b.exit.index for b in blocks] == [2, 0, 1, 2]
    assert (exit_from, exit_to) == (None, None)
    blocks, _, exit_from, exit_to, _ = plan_rollout(key, noise, **options)
    assert [b.exit.index for b in blocks] == [2] * 4
    assert (exit_from, exit_to) == (500.0, 0.0)
    drawn = {plan_rollout(Key(seed=1, update=u), noise, **options)[2] for u in range(40)}
    assert drawn == {1000.0, 750.0, 500.0}


def test_exit_x0_of_each_block_is_that_of_its_exit_step():
    spy = Spy()
    given = {
        "noise": torch.randn(1, 4, 4, 2, 2),
        "prompt_embeds": torch.zeros(1, 2, 8),
        "key": RecordedKey(
            choices={"exit": (1, 0)}, tensors={"renoise_b0_s0": torch.ones(1, 2, 4, 2, 2), "unused": torch.zeros(1)}
        ),
    }
    rollout(same_step_across_blocks=False, shift=1.0)(given, {"denoiser": spy})
    assert [c.timestep for c in spy.calls] == [1000.0, 750.0, 0.0, 1000.0]
    flow, *_ = toy_denoiser(given["noise"][:, :2], torch.full((1, 2), 1000.0), given["prompt_embeds"])
    x0 = given["noise"][:, :2] - flow
    same(spy.calls[1].latents, 0.25 * x0 + 0.75, rtol=1e-6, atol=1e-6)


def test_trailing_zero_is_dropped(model, randn):
    given = state(randn)
    with_zero, without = (rollout(steps=s)(given, {"denoiser": model}) for s in ((1000, 500, 0), (1000, 500)))
    assert torch.equal(with_zero["x0"], without["x0"])
    assert with_zero["exit_to"] == without["exit_to"]
    with pytest.raises(SpecError, match="the step list holds only 0"):
        rollout(steps=(0,))


@pytest.mark.parametrize("warp", [True, False])
def test_warp(warp):
    spy = Spy()
    given = {"noise": torch.randn(1, 2, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    steps = (1000, 750, 500, 250)
    out = rollout(steps=steps, shift=5.0, warp=warp, last_step_only=True)(given, {"denoiser": spy})
    told = [c.timestep for c in spy.calls]
    expected = [1000.0, 937.5, 1000 * 5 / 6, 625.0] if warp else [1000.0, 750.0, 500.0, 250.0]
    assert told == pytest.approx(expected)
    # The exit is reported on the axis before the shift, where the score timestep is drawn.
    assert out["exit_from"] == pytest.approx(250.0 if warp else 1000 * 0.25 / (5 - 4 * 0.25))
    assert out["exit_to"] == 0.0


# Given frames, lengths, windows


def test_image_to_video(model, randn):
    given = state(randn) | {"initial_latents": randn(2, 1, 4, 4, 4)}
    out = rollout(independent_first_frame=True, commit_last=True)(given, {"denoiser": model})
    assert out["x0"].shape[1] == 7
    assert torch.equal(out["x0"][:, :1], given["initial_latents"])
    assert out["cache"].positions == tuple(range(7))
    assert [len(c.positions) for c in out["cache"].chunks] == [7]  # in one room
    assert out["gradient_mask"].tolist() == [[False] + [True] * 6] * 2


@pytest.mark.parametrize("window", [{}, {"window": 5, "sink": 1}])
def test_extending_a_video_goes_on_where_a_rollout_stopped(model, randn, window):
    """Given the first four frames of a rollout, a second one makes the rest of it: the cache is all that a block knows."""
    given = state(randn, frames=8)
    whole = rollout(steps=(1000,), **window)(given, {"denoiser": model})["x0"]
    rest = given | {"noise": given["noise"][:, 4:], "initial_latents": whole[:, :4].detach()}
    out = rollout(steps=(1000,), **window)(rest, {"denoiser": model})
    same(out["x0"], whole)


def test_given_frames_go_through_the_window_too():
    spy = Spy()
    given = {"noise": torch.randn(1, 2, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    given["initial_latents"] = torch.randn(1, 8, 4, 2, 2)
    rollout(steps=(1000,), window=5, sink=1)(given, {"denoiser": spy})
    assert [c.seen for c in spy.calls] == [(), (0, 1), (0, 2, 3), (0, 4, 5), (0, 6, 7)]
    assert [c.timestep for c in spy.calls] == [0.0] * 4 + [1000.0]
    assert not any(c.grad for c in spy.calls[:4])


def test_given_frames_must_be_whole_blocks(randn):
    given = state(randn)
    with pytest.raises(ShapeError, match="3 frames do not divide into blocks of 2"):
        plan_rollout(given["key"], given["noise"], randn(2, 3, 4, 4, 4), steps=(1000,), frames_per_block=2)
    with pytest.raises(ShapeError, match="6 frames do not divide into blocks of 4; take 4 or 8 frames"):
        plan_rollout(given["key"], given["noise"], steps=(1000,), frames_per_block=4)


def test_random_lengths_are_shared_and_reach_both_ends():
    noise = torch.zeros(2, 10, 1)
    options = {"min_frames": 4, "frames_per_block": 3, "independent_first_frame": True}
    lengths = {crop_length(Key(seed=0, update=u, samples=(0, 1)), noise, **options).shape[1] for u in range(40)}
    assert lengths == {4, 7, 10}
    for update in range(10):
        whole = crop_length(Key(seed=0, update=update, samples=(0, 1)), noise, **options).shape[1]
        assert crop_length(Key(seed=0, update=update, samples=(1,)), noise[1:], **options).shape[1] == whole


def test_dmd_graph_trains_on_random_lengths(make_model, randn):
    models = {name: make_model(seed=i) for i, name in enumerate(("generator", "real_score", "fake_score"))}
    graph = Graph.from_spec("specs/dmd_generator.yaml", min_frames=2, frames_per_block=2, steps=(1000, 500))
    shapes = set()
    for seed in range(6):
        given = state(randn, seed=seed) | {"negative_embeds": randn(2, 4, 8)}
        out = graph(given, models)
        shapes.add(out["x0"].shape[1])
        assert out["loss_weight"] == out["x0"].numel()
        grads = torch.autograd.grad(out["loss"], list(models["generator"].parameters()))
        assert all(g.isfinite().all() for g in grads)
    assert len(shapes) > 1


@pytest.mark.parametrize("cache", CACHES)
def test_batch_in_one_go_equals_samples_alone(model, randn, cache):
    given = state(randn, batch=3, frames=6)
    params = {"context_noise": 100.0, "same_step_across_blocks": False, **CACHES[cache]}
    together = rollout(**params)(given, {"denoiser": model})["x0"]
    for i, sample in enumerate(given["key"].samples):
        key = Key(seed=0, phase="generator", update=3, samples=(sample,))
        alone = {"noise": given["noise"][i : i + 1], "prompt_embeds": given["prompt_embeds"][i : i + 1], "key": key}
        same(rollout(**params)(alone, {"denoiser": model})["x0"], together[i : i + 1])


def test_context_noise_tells_the_network_and_noises():
    given = {"noise": torch.randn(1, 4, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    spies = {flag: Spy() for flag in (True, False)}
    for flag, spy in spies.items():
        rollout(steps=(1000,), context_noise=100.0, noise_context=flag)(given, {"denoiser": spy})
        assert [c.timestep for c in spy.calls] == [1000.0, 100.0, 1000.0]
    noise = given["key"].normal("context_noise_b0", (2, 4, 2, 2))
    same(spies[True].calls[1].latents, 0.9 * spies[False].calls[1].latents + 0.1 * noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("keep", "seen"), [(False, (3, 4, 5)), (True, (0, 4, 5))])
def test_max_context_frames(keep, seen):
    spy = Spy()
    given = {"noise": torch.randn(1, 8, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    rollout(steps=(1000,), max_context_frames=3, keep_first_frame=keep)(given, {"denoiser": spy})
    assert spy.calls[-1].seen == seen
    assert spy.calls[-1].positions == (6, 7)


def test_no_context_at_all():
    spy = Spy()
    given = {"noise": torch.randn(1, 6, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    rollout(steps=(1000,), max_context_frames=0)(given, {"denoiser": spy})
    assert all(c.seen == () for c in spy.calls)


def test_no_context_cannot_keep_the_first_frame():
    with pytest.raises(SpecError, match="a context of 0 frames cannot keep the first one"):
        rollout(max_context_frames=0, keep_first_frame=True)


def test_a_context_noise_that_is_no_timestep():
    with pytest.raises(SpecError, match=r"a timestep lies in \[0, 1000\], found 2000"):
        rollout(context_noise=2000)


def test_straight_through_needs_what_the_exit_step_returned(randn):
    given = {"x0": randn(1, 2, 4, 2, 2), "cache": KVCache(), "key": Key(seed=0), "prompt_embeds": randn(1, 2, 8)}
    with pytest.raises(ShapeError, match="straight_through needs kv"):
        commit_context(toy_denoiser, **given, block=blocks_of((2,))[0], context_gradient="straight_through")


def test_attend_sink_false_keeps_the_last_frames_only():
    spies = [Spy(), Spy()]
    given = {"noise": torch.randn(1, 8, 4, 2, 2), "prompt_embeds": torch.zeros(1, 2, 8), "key": Key(seed=0)}
    for attend, spy in zip((True, False), spies, strict=True):
        rollout(steps=(1000,), window=5, sink=1, attend_sink=attend)(given, {"denoiser": spy})
    assert [spy.calls[-1].seen for spy in spies] == [(0, 4, 5), (3, 4, 5)]


def test_a_window_that_cannot_hold_block_and_sink():
    block = blocks_of((2, 2))[1]
    with pytest.raises(ShapeError, match="a window of 3 frames cannot hold a block of 2 and 2 sink frames; make it larger"):
        window_context(KVCache(), block, window=3, sink=2)
    with pytest.raises(SpecError, match="cannot hold a block and 2 sink frames"):
        rollout(window=2, sink=2)


@pytest.mark.parametrize(("commit_last", "frames"), [(False, 4), (True, 6)])
def test_commit_last(model, randn, commit_last, frames):
    given = state(randn)
    out = rollout(commit_last=commit_last)(given, {"denoiser": model})
    assert out["cache"].positions == tuple(range(frames))
    assert not any(x.requires_grad for layer in (0, 1) for x in out["cache"].layer(layer))


def test_relative_equals_absolute_while_nothing_is_evicted(model, randn):
    given = state(randn)
    absolute, relative = (rollout(rope=r, window=6)(given, {"denoiser": model})["x0"] for r in ("absolute", "relative"))
    same(relative, absolute)
    longer = state(randn, frames=8)
    absolute, relative = (
        rollout(rope=r, window=5, sink=1)(longer, {"denoiser": model})["x0"] for r in ("absolute", "relative")
    )
    same(relative[:, :4], absolute[:, :4])
    assert (relative[:, 6:] - absolute[:, 6:]).abs().max() > 1e-4


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_a_long_relative_rollout_stays_in_the_trained_range(make_model, monkeypatch, randn, rope):
    from sftk.models import wan

    places: list[tuple[int, ...]] = []
    original = wan.rope_table

    def spy(positions, *rest):
        places.append(positions)
        return original(positions, *rest)

    monkeypatch.setattr(wan, "rope_table", spy)
    model = make_model(num_layers=1)
    given = state(randn, batch=1, frames=63)
    with torch.no_grad():
        out = rollout(steps=(1000,), frames_per_block=3, window=21, sink=3, rope=rope)(given, {"denoiser": model})
    assert out["x0"].shape[1] == 63
    assert out["x0"].isfinite().all()
    assert out["cache"].positions == (0, 1, 2, *range(45, 60))
    assert max(max(p) for p in places) == (20 if rope == "relative" else 62)
