"""DMD, the critic and the denoising losses, through the public transforms and the packaged specs."""

from typing import Any, get_args

import torch
from parity_cases import GRADIENT, LOW_CLAMP, Case
from parity_rollouts import rollout_state, training_params
from torch import Tensor

from sftk import Graph
from sftk.functional import RecordedKey, predict_flow, predict_x0, timestep_to_sigma, x0_to_flow
from sftk.functional.schedule import TIMESTEPS, table_index
from sftk.objectives import dmd_gradient
from sftk.objectives.denoising import Prediction, denoising_error


def after_rollout(path: str, inputs: tuple[str, ...], **params: Any) -> Graph:
    """A spec's nodes behind its rollout, so that they run on a given x0; all that they write is returned."""
    nodes = Graph.from_spec(path, **params).nodes
    rollout = next(index for index, node in enumerate(nodes) if "x0" in node.writes)
    return Graph(nodes[rollout + 1 :], inputs=inputs, optional=("gradient_mask",))


def score_params(case: Case) -> dict[str, Any]:
    """Parameters of the part of a spec that is behind its rollout."""
    return {
        "schedule": "table",
        "shift": case.setting("generator_shift"),
        "score_shift": case.setting("score_shift"),
        "timestep_range": (case.setting("min_step"), case.setting("max_step")),
    }


def score_key(case: Case) -> RecordedKey:
    """Replays the score noise and the uniform draw behind the stored integer timestep, one for each sample."""
    uniform = case["raw_timestep"].reshape(-1, 1) / TIMESTEPS
    return RecordedKey(tensors={"score_noise": case["noise"], "score_timestep": uniform})


def check_levels(case: Case, timestep: Tensor) -> None:
    """Timesteps and the two sigmas: that of the noise, and that with which the score models are read."""
    case.check("timestep", timestep)
    for name, shift in (("noise_added", "generator_shift"), ("score_model", "score_shift")):
        case.check(f"sigma_{name}", timestep_to_sigma(timestep[:, 0], "table", case.setting(shift)))
    for name in ("generator", "score"):
        index = table_index(timestep[:, 0], case.setting(f"{name}_shift")).tolist()
        assert index == case.option(f"index_{name}_table", index)


def kl_tolerance(case: Case) -> float:
    """Coarser at the low clamp, where kl_grad divides small differences."""
    return LOW_CLAMP if case.tensors["timestep"].min() <= case.setting("min_step") else GRADIENT


def guidance(weight: float) -> float:
    """The public code's `cond + w (cond - uncond)` in the standard form; w = 0 is no guidance, scale 1."""
    return weight + 1.0


def test_dmd(case: Case):
    tolerance = kl_tolerance(case)
    scales = {role: guidance(case.option(f"{role}_guidance_scale", 0.0)) for role in ("real", "fake")}
    graph = after_rollout(
        "specs/dmd_generator.yaml",
        ("x0", "prompt_embeds", "negative_embeds", "key"),
        **score_params(case),
        guidance=scales["real"],
        fake_guidance=scales["fake"],
        normalizer_guard=False,
    )
    x0 = case["x0"].clone().requires_grad_()
    embeds = {"cond": case["prompt_embeds"], "uncond": case["negative_prompt_embeds"]}
    state = {"x0": x0, "prompt_embeds": embeds["cond"], "negative_embeds": embeds["uncond"], "key": score_key(case)}
    state |= {"gradient_mask": case["gradient_mask"]} if "gradient_mask" in case else {}
    models = {role: case.model(f"{role}_score") for role in ("real", "fake")}
    out = graph(state, {f"{role}_score": model for role, model in models.items()})

    check_levels(case, out["score_timestep"])
    case.check_if_stored("noisy", out["score_noisy"])
    case.check("pred_real", out["real_x0"])
    case.check("pred_fake", out["fake_x0"])
    case.check("kl_grad", out["grad"], tolerance)
    case.check("gradient_norm_log", out["gradient_norm"], tolerance)
    loss = out["loss"] / out["loss_weight"]
    case.check("loss", loss)
    case.check("grad_x0", torch.autograd.grad(loss, x0)[0], tolerance)
    plain = dmd_gradient(x0, out["fake_x0"], out["real_x0"], normalize=False, guard=False)
    case.check_if_stored("kl_grad_unnormalised", plain, tolerance)
    with torch.no_grad():
        for role, model in models.items():
            for side, prompt in embeds.items():
                call = (model, out["score_noisy"], out["score_timestep"], prompt)
                case.check_if_stored(f"flow_{role}_{side}", predict_flow(*call))
                x0_pred = predict_x0(*call, schedule="table", shift=case.setting("score_shift"))
                case.check_if_stored(f"pred_{role}_{side}", x0_pred)


def test_sid(case: Case):
    graph = after_rollout(
        "specs/sid_generator.yaml",
        ("x0", "prompt_embeds", "negative_embeds", "key"),
        **score_params(case),
        guidance=guidance(case.meta["real_guidance_scale"]),
        alpha=case.meta["sid_alpha"],
        normalizer_guard=False,
    )
    x0 = case["x0"].clone().requires_grad_()
    embeds = {"cond": case["prompt_embeds"], "uncond": case["negative_prompt_embeds"]}
    state = {"x0": x0, "prompt_embeds": embeds["cond"], "negative_embeds": embeds["uncond"], "key": score_key(case)}
    out = graph(state, {"real_score": case.model("real_score"), "fake_score": case.model("fake_score")})
    check_levels(case, out["score_timestep"])
    case.check("pred_fake", out["fake_x0"])
    loss = out["loss"] / out["loss_weight"]
    case.check("loss", loss)
    case.check("grad_x0", torch.autograd.grad(loss, x0)[0], GRADIENT)
    with torch.no_grad():
        for side, prompt in embeds.items():
            call = (case.model("real_score"), out["score_noisy"], out["score_timestep"], prompt)
            x0_pred = predict_x0(*call, schedule="table", shift=case.setting("score_shift"))
            case.check(f"pred_real_{side}", x0_pred)


def test_critic_flow(case: Case):
    model = case.model("fake_score")
    prediction = case.meta["denoising_loss_type"]
    graph = after_rollout(
        "specs/score_critic.yaml", ("x0", "prompt_embeds", "key"), **score_params(case), prediction=prediction
    )
    state = {"x0": case["x0"], "prompt_embeds": case["prompt_embeds"], "key": score_key(case)}
    out = graph(state, {"fake_score": model})
    check_levels(case, out["score_timestep"])
    case.check("pred_fake_x0", out["fake_x0"])
    sigma = timestep_to_sigma(out["score_timestep"], "table", case.setting("generator_shift"))
    case.check("flow_pred_in_loss", x0_to_flow(out["score_noisy"], out["fake_x0"], sigma))
    case.check("network_flow", predict_flow(model, out["score_noisy"], out["score_timestep"], case["prompt_embeds"]))
    loss = out["loss"] / out["loss_weight"]
    case.check("loss", loss)
    case.check_gradients("grad.", loss, model)


def test_denoising_losses(case: Case):
    alpha_bar = case["alphas_cumprod"][case["timestep"]]
    alpha_bar = alpha_bar.reshape(-1, *(1,) * (case["x"].dim() - 1))
    predictions = {"x0_pred": case["x_pred"], "flow_pred": case["flow_pred"], "noise_pred": case["noise_pred"]}
    for kind in get_args(Prediction):
        total, count = denoising_error(case["x"], case["noise"], **predictions, alpha_bar=alpha_bar, prediction=kind)
        case.check(f"loss_{kind}", total / count)


def test_dmd_generator_step(case: Case):
    for checkpointing in (False, True):
        for mode, prefix in {"straight_through": "grad_reference.", "detach": "grad_detached."}.items():
            check_generator_step(case, mode, prefix, checkpointing)


def check_generator_step(case: Case, mode: str, prefix: str, checkpointing: bool) -> None:
    meta, generator = case.meta, case.model("generator", checkpointing)
    schedules = {name: case.option(name, False) for name in ("ts_schedule", "ts_schedule_max")}
    spec = Graph.from_spec(
        "specs/dmd_generator.yaml",
        **training_params(case),
        context_gradient=mode,
        score_shift=case.setting("score_shift"),
        timestep_range=(case.setting("min_step"), case.setting("max_step")),
        guidance=guidance(meta["guidance_scale"]),
        fake_guidance=guidance(case.option("fake_guidance_scale", 0.0)),
        normalizer_guard=False,
        **schedules,
    )
    graph = Graph(spec.nodes, inputs=spec.inputs, optional=spec.optional, outputs=(*spec.outputs, "score_timestep"))
    state = rollout_state(case)
    low, high = meta["timestep_range"] if any(schedules.values()) else (0, TIMESTEPS)
    uniform = (case["raw_timestep"].reshape(-1, 1) - low) / (high - low)
    tensors = {key: case[key] for key in case if "noise" in key} | {"score_timestep": uniform}
    state |= {
        "negative_embeds": case["negative_prompt_embeds"],
        "key": RecordedKey(tensors=tensors, choices=state["key"].choices),
    }
    models = {"generator": generator, "real_score": case.model("real_score"), "fake_score": case.model("fake_score")}
    out = graph(state, models)
    case.check("x0", out["x0"])
    case.check("timestep", out["score_timestep"])
    loss = out["loss"] / out["loss_weight"]
    case.check("loss", loss)
    case.check_gradients(prefix, loss, generator, kl_tolerance(case))
