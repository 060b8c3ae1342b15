"""Denoising losses: what the critic, the teacher and the teacher-forced student learn from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.noise import alpha_bar, expand_sigma, x0_to_flow
from sftk.functional.schedule import ScheduleName, timestep_to_sigma
from sftk.objectives.dmd import at_least_float32, element_mask

Prediction = Literal["flow", "x0", "v", "noise"]


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of weighted squared errors and the number of elements.

    Args:
        prediction, target: the same shape.
        weight: broadcast over them; None is 1. It does not enter the number of elements.

    Example:
        >>> squared_error(torch.tensor([1.0, 2.0]), torch.zeros(2))
        (tensor(5.), tensor(2.))
    """
    error = (at_least_float32(prediction) - at_least_float32(target)) ** 2
    if weight is not None:
        error = error * weight.to(error.dtype)
    return error.sum(), torch.full((), float(error.numel()), device=error.device, dtype=error.dtype)


def denoising_error(
    x0: Tensor, noise: Tensor, x0_pred: Tensor, flow_pred: Tensor, noise_pred: Tensor, alpha_bar: Tensor, prediction: Prediction
) -> tuple[Tensor, Tensor]:
    """Sum and count of one of the four denoising losses, from given predictions.

    `x0`: |x0 - x0_pred|^2. `v`: |x0 - x0_pred|^2 / (1 - alpha_bar). `noise`: |noise - noise_pred|^2.
    `flow`: |noise - x0 - flow_pred|^2.

    Args:
        alpha_bar: broadcastable to x0; only `v` uses it.

    Source: progressive distillation, arXiv 2202.00512, section 4 and appendix D, for `v`.

    Example:
        >>> one = torch.ones(2)
        >>> denoising_error(one, one, 0 * one, one, one, torch.tensor(0.5), "v")
        (tensor(4.), tensor(2.))
    """
    if prediction == "flow":
        return squared_error(flow_pred, noise - x0)
    if prediction == "noise":
        return squared_error(noise_pred, noise)
    return squared_error(x0_pred, x0, 1 / (1 - alpha_bar) if prediction == "v" else None)


def _example(batch: int, randn) -> dict:
    return {
        **{name: randn(batch, 3, 4, 2, 2) for name in ("x0", "noise", "noisy", "x0_pred")},
        "timestep": 20 + 960 * randn(batch, 3).sigmoid(),
        "prediction": "v",
    }


@transform(out=("loss", "loss_weight"), kind="reduced", example=_example)
def denoising_loss(
    x0: Tensor,
    noise: Tensor,
    noisy: Tensor,
    timestep: Tensor,
    x0_pred: Tensor,
    *,
    prediction: Prediction = "flow",
    schedule: ScheduleName = "continuous",
    shift: float = 1.0,
):
    """The critic's loss on samples of the student, in terms of flow, x0, v or noise.

    Args:
        x0: [B, F, C, H, W], the samples; noise: what was added; noisy: the result, at `timestep`.
        timestep: [B, F], above 0.
        x0_pred: the critic's prediction.
        prediction: what is compared; v and noise use alpha-bar = (1-sigma)^2 / ((1-sigma)^2 + sigma^2).
        schedule, shift: sigma of the timestep as it was used to add the noise.

    Returns:
        loss: [] float32, the sum. loss_weight: [], the number of elements.

    Source: DMD, arXiv 2311.18828, eq. 6 (for x0), with the other parametrisations; arXiv 2202.00512 for `v`.

    Example:
        >>> x0, noise = torch.zeros(1, 1), torch.ones(1, 1)
        >>> denoising_loss(x0, noise, 0.5 * noise, torch.tensor([500.0]), x0)[0]
        tensor(0.)
    """
    x0, noise, noisy, x0_pred = (at_least_float32(x) for x in (x0.detach(), noise, noisy.detach(), x0_pred))
    sigma = timestep_to_sigma(timestep, schedule, shift)
    noise_pred = (noisy - (1 - expand_sigma(sigma, noisy)) * x0_pred) / expand_sigma(sigma, noisy)
    flow_pred = x0_to_flow(noisy, x0_pred, sigma)
    return denoising_error(x0, noise, x0_pred, flow_pred, noise_pred, expand_sigma(alpha_bar(sigma), noisy), prediction)


def _flow_example(batch: int, randn) -> dict:
    return {name: randn(batch, 3, 4, 2, 2) for name in ("flow", "target")} | {"gradient_mask": randn(batch, 3) > -9}


@transform(out=("loss", "loss_weight"), kind="reduced", example=_flow_example)
def flow_matching_loss(flow: Tensor, target: Tensor, gradient_mask: Tensor | None = None):
    """Mean squared error of a predicted flow.

    Args:
        flow: [B, F, C, H, W], predicted.
        target: `noise - x0`.
        gradient_mask: [B, F] bool, frames that enter the loss.

    Returns:
        loss: [] float32, the sum. loss_weight: [], the number of elements.

    Source: flow matching, arXiv 2210.02747, eq. 23.

    Example:
        >>> flow_matching_loss(torch.ones(1, 2), torch.zeros(1, 2))
        (tensor(2.), tensor(2.))
    """
    flow, target = at_least_float32(flow), at_least_float32(target)
    weight = element_mask(gradient_mask, flow)
    return (weight * (flow - target) ** 2).sum(), weight.sum()
