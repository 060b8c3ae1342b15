"""Training rollouts: outputs, every intermediate, exit intervals, and both gradients with and without checkpointing."""

import re

import pytest
import torch
from parity_cases import Case, case_names, family_of
from parity_rollouts import Recorder, block_starts, python_rollout, rollout_state, step_predictions, training_params

from sftk import Graph
from sftk.functional import timestep_to_sigma, warp_steps
from sftk.functional.schedule import table_index

MODES = {"straight_through": "grad_reference.", "detach": "grad_detached."}


def test_rollout(case: Case):
    check_schedule(case)
    check_forward(case)
    for checkpointing in (False, True):
        check_gradients(case, checkpointing)


def check_schedule(case: Case) -> None:
    meta, shift = case.meta, case.meta["timestep_shift"]
    steps = torch.tensor(warp_steps(meta["denoising_step_list"], shift))[: len(case.tensors["denoising_steps"])]
    case.check("denoising_steps", steps)
    case.check_if_stored("denoising_sigmas", timestep_to_sigma(steps, "table", shift))
    level = torch.tensor([training_params(case)["context_noise"]])
    case.check_if_stored("context_sigma", timestep_to_sigma(level, "table", shift))
    assert table_index(level, shift).tolist() == [case.option("context_sigma_index", table_index(level, shift).item())]


@torch.no_grad()
def check_forward(case: Case) -> None:
    params, recorder = training_params(case), Recorder(case.model())
    out = python_rollout(params)(rollout_state(case), {"denoiser": recorder})
    case.check("output", out["x0"])
    for key, value in step_predictions(out):
        case.check_if_stored(key, value)
    for index, start in enumerate(block_starts(case)):
        passes = recorder.of_block(start)
        exit_index = case.meta["exits"][0 if params["same_step_across_blocks"] else index]
        assert len(passes) == exit_index + 2, "the steps up to the exit step, then the context pass"
        assert passes[-1].timestep == pytest.approx(params["context_noise"])
        case.check_if_stored(f"context_input_b{index}", passes[-1].latents)
    assert [block.frames for block in out["blocks"]] == case.meta["block_frames"]
    if params["same_step_across_blocks"] or len(set(case.meta["exits"])) > 1:
        for end in ("from", "to"):
            assert out[f"exit_{end}"] == case.meta.get(f"denoised_timestep_{end}", out[f"exit_{end}"])

    spec = Graph.from_spec("specs/rollout.yaml", **params)(rollout_state(case), {"denoiser": case.model()})
    case.check("output", spec["x0"])
    for key in ("x0", "gradient_mask"):
        assert torch.equal(spec[key], out[key]), f"the rollout in YAML and the one in Python differ in {key}"
    assert (spec["exit_from"], spec["exit_to"]) == (out["exit_from"], out["exit_to"])
    flags = case.option("blocks_with_gradient", [True] * len(out["blocks"]))
    expected = [flag for flag, frames in zip(flags, case.meta["block_frames"], strict=True) for _ in range(frames)]
    given = spec["gradient_mask"].shape[1] - len(expected)
    assert spec["gradient_mask"].tolist() == [[False] * given + expected] * len(case["noise"])


def check_gradients(case: Case, checkpointing: bool) -> None:
    if "cotangent" not in case:
        assert not any(key.startswith("grad") for key in case)
        return
    model = case.model(checkpointing=checkpointing)
    for mode, prefix in MODES.items():
        if not case.names(prefix):
            assert len(case.meta["block_frames"]) == 1, f"{case.name} has no {prefix}* and more than one block"
            prefix = MODES["straight_through"]
        graph = Graph.from_spec("specs/rollout.yaml", **training_params(case), context_gradient=mode)
        out = graph(rollout_state(case), {"denoiser": model})
        case.check("output", out["x0"])
        case.check_gradients(prefix, (out["x0"] * case["cotangent"]).sum(), model)


def two_samples(case: Case) -> Case | None:
    """The same case as a batch of two equal samples."""
    tensors = {key: torch.cat([value, value]) if value.dim() > 2 else value for key, value in case.tensors.items()}
    return Case(case.name, tensors, case.meta)


def one_block_less(case: Case) -> Case | None:
    """The case without its last block, which no earlier block depends on."""
    *lengths, last = case.meta["block_frames"]
    if not lengths:
        return None
    tensors = {key: value for key, value in case.tensors.items() if not re.search(rf"_b{len(lengths)}(_|$)", key)}
    tensors |= {key: tensors[key][:, :-last] for key in ("noise", "output")}
    shorter = {key: case.meta[key][: len(lengths)] for key in ("exits", "blocks_with_gradient") if case.meta.get(key)}
    return Case(case.name, tensors, case.meta | shorter | {"block_frames": lengths})


def no_unused_steps(case: Case) -> Case | None:
    """The case with a step list that ends at the latest exit."""
    count = max(case.meta["exits"]) + 1
    if count == len(case.tensors["denoising_steps"]):
        return None
    tensors = case.tensors | {key: case.tensors[key][:count] for key in ("denoising_steps", "denoising_sigmas")}
    meta = case.meta | {"denoising_step_list": case.meta["denoising_step_list"][:count]}
    ends = {"denoised_timestep_to": 0} if meta.get("denoised_timestep_to") is not None else {}
    return Case(case.name, tensors, meta | ends)


@pytest.mark.parametrize("change", [two_samples, one_block_less, no_unused_steps])
def test_changed_cases_keep_their_numbers(change):
    cases = [Case(name) for name in case_names() if family_of(name) == "rollout"]
    changed = [found for case in cases if "cotangent" not in case and (found := change(case))]
    if not changed:
        pytest.skip("no rollout in the folder can be changed in this way")
    for case in changed:
        check_schedule(case)
        check_forward(case)
        case.assert_complete()
