"""The backbone: weights by their original names, bidirectional, block-causal and teacher-forced passes."""

import torch
from parity_cases import GRADIENT, Case, wan_config
from torch import Tensor

from sftk.core.geometry import split_blocks
from sftk.functional import Layout, predict_flow, predict_flow_teacher_forced, predict_x0
from sftk.models import WanModel


def check_gradients(case: Case, flow: Tensor, x: Tensor, x_key: str) -> None:
    """Compares the gradients of `sum(flow * cotangent)` with those that the file has."""
    if "cotangent" not in case:
        return
    total = (flow * case["cotangent"]).sum()
    case.check_if_stored(x_key, torch.autograd.grad(total, x, retain_graph=True)[0], GRADIENT)
    if set(case.names("grad.")) - {"x"}:
        case.check_gradients("grad.", total, case.model())


def test_weights(case: Case):
    model = WanModel(wan_config(case.meta["model"]))
    model.load_state_dict(case.tensors)
    found = model.state_dict()
    assert set(found) == set(case)
    for name, weight in found.items():
        case.check(name, weight, tolerance=0.0)


def test_wan_forward(case: Case):
    model = case.model()
    x, t = case["x"].clone().requires_grad_(), case["t"]
    flow = model(x, t, case["prompt_embeds"])[0]
    case.check("flow", flow)
    per_frame = t[:, None].expand(x.shape[:2])
    case.check("flow", predict_flow(model, x, per_frame, case["prompt_embeds"]))
    if "x0" in case:
        shift = case.option("wrapper_timestep_shift", case.setting("score_shift"))
        case.check("x0", predict_x0(model, x, per_frame, case["prompt_embeds"], schedule="table", shift=shift))
    check_gradients(case, flow, x, "grad.x")


def test_causal_forward(case: Case):
    model = case.model()
    x = case["x"].clone().requires_grad_()
    blocks = split_blocks(x.shape[1], case.frames_per_block, case.first_frame_alone)
    layout = Layout(kind="block_causal", blocks=blocks, window=case.window)
    case.check("frame_mask", layout.frame_mask())
    case.check("flow", model(x, case["t"], case["prompt_embeds"], layout=layout)[0])
    flow = predict_flow(
        model,
        x,
        case["t"],
        case["prompt_embeds"],
        frames_per_block=case.frames_per_block,
        independent_first_frame=case.first_frame_alone,
        window=case.window,
    )
    case.check("flow", flow)
    check_gradients(case, flow, x, "grad_x")


def test_teacher_forcing(case: Case):
    x = case["x"].clone().requires_grad_()
    flow = predict_flow_teacher_forced(
        case.model(),
        x,
        case["t"],
        case["clean_x"],
        case["prompt_embeds"],
        case.get("aug_t"),
        frames_per_block=case.frames_per_block,
        independent_first_frame=case.first_frame_alone,
    )
    case.check("flow", flow)
    blocks = split_blocks(x.shape[1], case.frames_per_block, case.first_frame_alone)
    case.check("frame_mask", Layout(kind="teacher_forcing", blocks=blocks).frame_mask())
    check_gradients(case, flow, x, "grad_x")
