"""MeanFlow and the continuous-time consistency model: regression targets that hold a tangent of the model itself."""

from __future__ import annotations

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.noise import expand_sigma
from sftk.functional.predict import Denoiser, toy_denoiser
from sftk.functional.schedule import TIMESTEPS
from sftk.functional.tangent import flow_tangent
from sftk.objectives.dmd import at_least_float32


def _velocity_example(batch: int, randn) -> dict:
    return {
        "denoiser": toy_denoiser,
        "noisy": randn(batch, 3, 4, 2, 2),
        "timestep": randn(batch, 3).sigmoid() * 1000,
        "velocity": randn(batch, 3, 4, 2, 2),
        "prompt_embeds": randn(batch, 2, 8),
        "negative_embeds": randn(batch, 2, 8),
        "from_data": 0.5,
        "from_model": 0.25,
    }


@transform(out="guided_velocity", kind="per_sample", models=("denoiser",), example=_velocity_example)
def mix_velocity(
    denoiser: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    velocity: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    from_data: float = 1.0,
    from_model: float = 0.0,
):
    """The velocity along which a few-step model is trained: of the data, of a model, or guided between both.

    `from_data v + from_model F(x, c) + (1 - from_data - from_model) F(x, no prompt)`, without gradient. The data's velocity
    alone is `from_data: 1`; a teacher's with guidance s is `from_data: 0`, `from_model: s`; MeanFlow's own guidance is omega
    and kappa, with the trained model as the denoiser, and acts as a scale of omega / (1 - kappa).

    Args:
        denoiser: predicts F, the instantaneous flow.
        noisy, timestep, prompt_embeds, negative_embeds: see `predict_x0_cfg`.
        velocity: [B, F, C, H, W], `noise - x0` of the data.
        from_data, from_model: the weights; a model is called only where it has one.

    Returns:
        guided_velocity: [B, F, C, H, W].

    Source: MeanFlow, arXiv 2505.13447, eq. 19 to 21.

    Example:
        >>> one = torch.ones(1, 3, 4, 2, 2)
        >>> mix_velocity(toy_denoiser, 0 * one, torch.zeros(1, 3), one, torch.zeros(1, 2, 8), torch.ones(1, 2, 8),
        ...     from_data=0.5, from_model=0.25).mean()  # the toy's flow is 0 with zeros as its prompt and 0.2 with ones
        tensor(0.5500)
    """
    without = 1 - from_data - from_model
    mixed = from_data * velocity.detach()
    with torch.no_grad():
        if from_model:
            mixed = mixed + from_model * denoiser(noisy, timestep, prompt_embeds)[0]
        if abs(without) > 1e-9:
            mixed = mixed + without * denoiser(noisy, timestep, negative_embeds)[0]
    return mixed


def _example(batch: int, randn) -> dict:
    return {
        "denoiser": toy_denoiser,
        "noisy": randn(batch, 3, 4, 2, 2),
        "timestep": 500 + 500 * randn(batch, 3).sigmoid(),
        "velocity": randn(batch, 3, 4, 2, 2),
        "prompt_embeds": randn(batch, 2, 8),
    }


def _interval_example(batch: int, randn) -> dict:
    return _example(batch, randn) | {"interval": 500 * randn(batch, 3).sigmoid()}


@transform(out="target", kind="per_sample", models=("denoiser",), example=_interval_example)
def mean_flow_target(
    denoiser: Denoiser, noisy: Tensor, timestep: Tensor, interval: Tensor, velocity: Tensor, prompt_embeds: Tensor
):
    """What the average velocity over an interval should be: `v - (t - r) d/dt u(z_t, r, t)`.

    With u the model's own prediction, this is the MeanFlow identity: the average velocity, and it alone, equals its target.
    Where the interval is empty the target is v, and the objective flow matching.

    Args:
        denoiser: predicts u; is told the interval, see `Denoiser`.
        noisy: [B, F, C, H, W], z_t. timestep: [B, F], 1000 t. interval: [B, F], 1000 (t - r).
        velocity: [B, F, C, H, W], `noise - x0`, or a guided one from `mix_velocity`.
        prompt_embeds: [B, L, D].

    Returns:
        target: [B, F, C, H, W], without gradient.

    Source: MeanFlow, arXiv 2505.13447, eq. 6, 8 and 10.

    Example:
        >>> mean_flow_target(**_interval_example(1, torch.randn)).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    _, tangent = flow_tangent(denoiser, noisy, timestep, prompt_embeds, velocity, interval)
    return velocity.detach() - expand_sigma(interval / TIMESTEPS, noisy) * tangent


def _tangent_example(batch: int, randn) -> dict:
    return _example(batch, randn) | {"ramp": 0.5}


@transform(out="target", kind="per_sample", models=("denoiser",), example=_tangent_example)
def consistency_target(
    denoiser: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    velocity: Tensor,
    prompt_embeds: Tensor,
    ramp: float | None = None,
    *,
    normalize: bool = True,
    guard: float = 0.1,
):
    """What a consistency model's flow should be: its own, moved along the tangent of the consistency function.

    With `f(x, s) = x - s F(x, s)`, the model's x0, the tangent is `g = df/ds = v - F - s dF/ds`: it vanishes where f does not
    change along the flow's path. Regressing F on `F + g` gives the gradient of the continuous-time consistency loss.

    Args:
        denoiser: predicts F.
        noisy, timestep, prompt_embeds: see `predict_flow`.
        velocity: [B, F, C, H, W], `noise - x0` (consistency training) or a teacher's (distillation), see `mix_velocity`.
        ramp: in [0, 1], share of the term `s dF/ds`; at 0 the target is v. See `ramp`.
        normalize: replace g by `g / (rms(g) + guard)`, sample by sample.
        guard: keeps small tangents small.

    Returns:
        target: [B, F, C, H, W], without gradient.

    Source: sCM, arXiv 2410.11081, section 4 (tangent, its warm-up and normalisation), written for the path
    `(1 - s) x0 + s noise` instead of TrigFlow's.

    Example:
        >>> consistency_target(**_tangent_example(1, torch.randn)).shape
        torch.Size([1, 3, 4, 2, 2])
    """
    flow, tangent = flow_tangent(denoiser, noisy, timestep, prompt_embeds, velocity)
    share = 1.0 if ramp is None else ramp
    step = velocity.detach() - flow - share * expand_sigma(timestep / TIMESTEPS, noisy) * tangent
    if normalize:
        size = at_least_float32(step).square().mean(dim=tuple(range(1, step.dim())), keepdim=True).sqrt()
        step = step / (size + guard).to(step.dtype)
    return flow + step


def _loss_example(batch: int, randn) -> dict:
    return {name: randn(batch, 3, 4, 2, 2) for name in ("flow", "target")}


@transform(out=("loss", "loss_weight"), kind="reduced", example=_loss_example)
def adaptive_loss(flow: Tensor, target: Tensor, *, power: float = 1.0, guard: float = 1e-3):
    """Squared error, each sample's divided by a power of its own size: large errors pull less.

    Args:
        flow: [B, F, C, H, W], predicted.
        target: the same shape.
        power: 0 is the mean squared error; 1 comes near its square root, and is the published choice.
        guard: added to a sample's mean squared error before the power.

    Returns:
        loss: [] float32, the sum. loss_weight: [], the number of elements.

    Source: MeanFlow, arXiv 2505.13447, eq. 22, with the mean of a sample's squared errors for their sum.

    Example:
        >>> adaptive_loss(torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2), power=0.5, guard=0.0)
        (tensor(6.), tensor(2.))
    """
    error = (at_least_float32(flow) - at_least_float32(target.detach())) ** 2
    each = error.flatten(1).mean(dim=1)
    weight = (each.detach() + guard) ** -power
    return (weight * error.flatten(1).sum(dim=1)).sum(), torch.full_like(weight[0], float(error.numel()))


@transform(out="error", kind="reduced", example=_loss_example)
def mean_error(flow: Tensor, target: Tensor):
    """Mean squared error, a number to watch where the loss is divided by it.

    Args:
        flow, target: any shape, the same.

    Returns:
        error: [] float32, without gradient.

    Example:
        >>> mean_error(torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor(5.)
    """
    return (at_least_float32(flow.detach()) - at_least_float32(target.detach())).square().mean()
