"""What the tests of training rollouts and of inference share: parameters, the rollout in Python, a record of its passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
from parity_cases import Case
from torch import Tensor

from sftk import Graph
from sftk.core.fold import Fold
from sftk.functional import (
    RecordedKey,
    begin_block,
    commit_context,
    commit_given,
    denoise_step,
    exit_step,
    join_blocks,
    plan_rollout,
    renoise,
    start_cache,
    window_context,
)
from sftk.models import WanModel

PARAMS = {"last_step_only": False, "same_step_across_blocks": True, "grad_frames": None, "noise_context": True}
PARAMS |= {"context_gradient": "detach", "window": None, "sink": 0}


def common_params(case: Case) -> dict[str, Any]:
    """Parameters of `specs/rollout.yaml` that every case has, in training and in inference."""
    meta = case.meta
    return {
        "steps": tuple(meta["denoising_step_list"]),
        "shift": meta["timestep_shift"],
        "frames_per_block": meta["num_frame_per_block"],
        "independent_first_frame": case.first_frame_alone,
        "context_noise": float(case.option("context_noise", 0)),
        "schedule": "table",
    }


def training_params(case: Case) -> dict[str, Any]:
    """Parameters of a training rollout."""
    same = case.option("same_step_across_blocks", len(set(case.meta["exits"])) == 1)
    return common_params(case) | {"same_step_across_blocks": same, "grad_frames": grad_frames(case)}


def grad_frames(case: Case) -> int | None:
    """Frames from the first block that carries gradient to the end; None when all do."""
    flags = case.meta.get("blocks_with_gradient")
    if flags is None or all(flags):
        return None
    lengths = case.meta["block_frames"]
    return sum(lengths[flags.index(True) :]) if any(flags) else 0


def rollout_state(case: Case) -> dict[str, Any]:
    """The graph's inputs, all of them from the file."""
    exits = case.meta.get("exits")
    state = {
        "noise": case["noise"],
        "prompt_embeds": case["prompt_embeds"],
        "key": RecordedKey(tensors=case, choices={} if exits is None else {"exit": tuple(exits)}),  # pyright: ignore[reportArgumentType]
    }
    return state | ({"initial_latents": case["initial_latent"]} if "initial_latent" in case else {})


def python_rollout(params: dict[str, Any]) -> Graph:
    """The rollout written in Python, with the x0 of every step and the blocks among its outputs."""
    params = PARAMS | params

    def some(*names: str) -> dict[str, Any]:
        return {name: params[name] for name in names}

    plan = some("steps", "shift", "frames_per_block", "independent_first_frame")
    plan |= some("same_step_across_blocks", "last_step_only", "grad_frames")
    sigma, sees = some("schedule", "shift"), window_context.node(**some("window", "sink"))
    context = some("context_noise", "noise_context", "context_gradient") | {"commit_last": True}
    lead = Fold(
        [denoise_step.node(out={"kv": None}, grad=False, **sigma), renoise.node(grad=False, **sigma)],
        over="lead",
        item="step",
        carry=("noisy",),
        collect={"x0": "lead_x0"},
    )
    block = [begin_block, sees, lead, exit_step.node(**sigma), commit_context.node(**context, **sigma)]
    return Graph(
        [
            plan_rollout.node(**plan),
            start_cache,
            Fold([sees, commit_given], over="given_blocks", item="block", carry=("cache",)),
            Fold(
                block, over="blocks", item="block", carry=("cache",), collect={"x0": "x0_blocks", "lead_x0": "lead_x0_blocks"}
            ),
            join_blocks,
        ],
        inputs=("noise", "prompt_embeds", "key"),
        optional=("initial_latents",),
        outputs=("x0", "blocks", "given_blocks", "exit_from", "exit_to", "gradient_mask", "x0_blocks", "lead_x0_blocks"),
    )


@attrs.frozen(kw_only=True)
class Pass:
    """One call of the model: what it got, and the frames that its keys come from."""

    latents: Tensor
    timestep: float
    positions: tuple[int, ...]
    attended: tuple[int, ...]


class Recorder:
    """A model behind the port that writes down its calls."""

    def __init__(self, model: WanModel):
        self.model, self.passes = model, list[Pass]()

    def __call__(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, *, cache, positions, **rest: Any):
        attended = (*cache.positions, *positions)
        (told,) = timestep.unique().tolist()
        self.passes.append(Pass(latents=latents, timestep=told, positions=tuple(positions), attended=attended))
        return self.model(latents, timestep, prompt_embeds, cache=cache, positions=positions, **rest)

    def of_block(self, start: int) -> list[Pass]:
        """The calls for the block that starts at a frame."""
        return [found for found in self.passes if found.positions[0] == start]


def block_starts(case: Case) -> list[int]:
    """First frame of each generated block."""
    given = case.tensors["initial_latent"].shape[1] if "initial_latent" in case else 0
    lengths = case.meta["block_frames"]
    return [given + sum(lengths[:index]) for index in range(len(lengths))]


def step_predictions(out: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Key and value of every x0 prediction of a rollout."""
    for index, (lead, last) in enumerate(zip(out["lead_x0_blocks"], out["x0_blocks"], strict=True)):
        for step, value in enumerate((*lead, last)):
            yield f"x0_b{index}_s{step}", value
