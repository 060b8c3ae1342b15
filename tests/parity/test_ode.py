"""ODE regression through its packaged spec."""

import torch
from parity_cases import Case

from sftk import Graph
from sftk.functional import RecordedKey
from sftk.functional.schedule import warp_steps


def test_ode_regression(case: Case):
    meta, states = case.meta, case["ode_latent"]
    steps = meta["denoising_step_list"]
    model = case.model()
    spec = Graph.from_spec(
        "specs/ode_regression.yaml",
        steps=tuple(steps),
        shift=meta["timestep_shift"],
        frames_per_block=case.frames_per_block,
        independent_first_frame=case.first_frame_alone,
        image_to_video=case.option("i2v", False),
        schedule="table",
    )
    graph = Graph(spec.nodes, inputs=spec.inputs, optional=spec.optional)
    # The middle of the interval of uniforms that stand for the recorded integer.
    key = RecordedKey(tensors={"ode_step": (case["raw_random_index"] + 0.5) / len(steps)})
    out = graph({"ode_latents": states, "prompt_embeds": case["prompt_embeds"], "key": key}, {"generator": model})
    case.check("denoising_steps", torch.tensor(warp_steps(steps, meta["timestep_shift"])))
    case.check("index", out["step_index"])
    case.check("timestep", out["timestep"])
    case.check("noisy_input", out["noisy"])
    case.check("mask", out["gradient_mask"])
    case.check("output_x0", out["x0"])
    loss = out["loss"] / out["loss_weight"]
    case.check("loss", loss)
    case.check("unnormalized_loss", (out["x0"] - states[:, -1]).square().flatten(1).mean(dim=1))
    case.check_gradients("grad.", loss, model)
