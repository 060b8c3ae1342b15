"""Few-step inference: outputs, and which frames every pass attends to."""

import pytest
import torch
from parity_cases import Case
from parity_rollouts import Recorder, common_params, python_rollout, rollout_state, step_predictions

from sftk import Graph
from sftk.functional import warp_steps


@torch.no_grad()
def test_inference(case: Case):
    meta = case.meta
    steps = torch.tensor(warp_steps(meta["denoising_step_list"], meta["timestep_shift"]))
    case.check("denoising_steps", steps[: len(case.tensors["denoising_steps"])])

    params = common_params(case) | {"last_step_only": True, "noise_context": False}
    params |= {"window": case.window, "sink": case.option("sink_size", 0)}
    spec = Graph.from_spec("specs/rollout.yaml", **params)(rollout_state(case), {"denoiser": case.model()})
    case.check("output", spec["x0"])

    recorder = Recorder(case.model())
    out = python_rollout(params)(rollout_state(case), {"denoiser": recorder})
    assert torch.equal(spec["x0"], out["x0"]), "the rollout in YAML and the one in Python differ"
    for key, value in step_predictions(out):
        case.check_if_stored(key, value)
    assert [block.frames for block in out["blocks"]] == meta["block_frames"]
    check_passes(case, recorder)


def check_passes(case: Case, recorder: Recorder) -> None:
    if case.meta.get("pass_log"):
        found = [(done.positions[0], len(done.positions)) for done in recorder.passes]
        assert found == [(start, frames) for start, frames, _ in case.meta["pass_log"]]
        told = [timestep for *_, timestep in case.meta["pass_log"]]
        assert [done.timestep for done in recorder.passes] == pytest.approx(told, abs=1e-3), "the log has three decimals"
    attended = case.meta["attended_frames"]
    assert {done.positions[0] for done in recorder.passes} == {int(start) for start in attended}
    for start, frames in attended.items():
        same = case.option("attended_frames_same_for_all_passes_of_block", {}).get(start, True)
        passes = recorder.of_block(int(start))
        assert passes
        for done in passes if same else passes[:1]:
            assert list(done.attended) == frames, f"{case.name}: the block at frame {start} attends to {done.attended}"
