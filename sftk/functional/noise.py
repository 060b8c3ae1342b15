"""Noising, and the conversions between x0, flow, v and noise. All take sigma; how a timestep becomes one is `schedule`'s."""

from __future__ import annotations

from torch import Tensor

from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional.schedule import ScheduleName, timestep_to_sigma


def expand_sigma(sigma: Tensor, like: Tensor) -> Tensor:
    """Sigma with trailing axes, so that it broadcasts over latents.

    Args:
        sigma: [B] or [B, F].
        like: [B, F, C, H, W] or any tensor that begins with sigma's axes.

    Raises:
        ShapeError: sigma's axes do not begin `like`.

    Example:
        >>> import torch
        >>> expand_sigma(torch.zeros(2, 3), torch.zeros(2, 3, 4, 8, 8)).shape
        torch.Size([2, 3, 1, 1, 1])
    """
    fits = sigma.dim() <= like.dim() and all(s in (1, n) for s, n in zip(sigma.shape, like.shape[: sigma.dim()], strict=True))
    if not fits:
        raise ShapeError(
            f"sigma of shape {list(sigma.shape)} does not fit latents of shape {list(like.shape)}; expected [B] or [B, F]"
        )
    return sigma.reshape(sigma.shape + (1,) * (like.dim() - sigma.dim())).to(like.dtype)


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) x0 + sigma noise`.

    Args:
        x0, noise: [B, F, C, H, W].
        sigma: [B] or [B, F].

    Source: flow matching, arXiv 2210.02747, the optimal-transport path.

    Example:
        >>> import torch
        >>> interpolate(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.25]))
        tensor([[0.2500]])
    """
    sigma = expand_sigma(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def flow_to_x0(noisy: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """`x_t - sigma flow`.

    Example:
        >>> import torch
        >>> flow_to_x0(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0.25]))
        tensor([[0.7500]])
    """
    return noisy - expand_sigma(sigma, noisy) * flow


def x0_to_flow(noisy: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """`(x_t - x0) / sigma`; sigma must be above 0.

    Example:
        >>> import torch
        >>> x0_to_flow(torch.ones(1, 1), torch.full((1, 1), 0.75), torch.tensor([0.25]))
        tensor([[1.]])
    """
    return (noisy - x0) / expand_sigma(sigma, noisy)


def flow_to_noise(noisy: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """`x_t + (1 - sigma) flow`, the noise that a flow prediction implies.

    Example:
        >>> import torch
        >>> flow_to_noise(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.25]))
        tensor([[0.7500]])
    """
    return noisy + (1 - expand_sigma(sigma, noisy)) * flow


def noise_to_x0(noisy: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(x_t - sigma noise) / (1 - sigma)`; sigma must be below 1.

    Example:
        >>> import torch
        >>> noise_to_x0(torch.full((1, 1), 0.25), torch.ones(1, 1), torch.tensor([0.25]))
        tensor([[0.]])
    """
    sigma = expand_sigma(sigma, noisy)
    return (noisy - sigma * noise) / (1 - sigma)


def alpha_bar(sigma: Tensor) -> Tensor:
    """`(1 - s)^2 / ((1 - s)^2 + s^2)`: the variance-preserving alpha-bar with a flow model's signal-to-noise ratio.

    Example:
        >>> import torch
        >>> alpha_bar(torch.tensor([0.5, 0.0]))
        tensor([0.5000, 1.0000])
    """
    signal, noise = (1 - sigma) ** 2, sigma**2
    return signal / (signal + noise)


def _example(batch: int, randn) -> dict:
    return {
        "x0": randn(batch, 3, 4, 2, 2),
        "noise": randn(batch, 3, 4, 2, 2),
        "timestep": randn(batch, 3).sigmoid() * 1000,
        "schedule": "table",
        "shift": 5.0,
    }


@transform(out="noisy", kind="per_sample", example=_example)
def add_noise(x0: Tensor, noise: Tensor, timestep: Tensor, *, schedule: ScheduleName = "continuous", shift: float = 1.0):
    """Noises clean latents to a timestep: `(1 - sigma) x0 + sigma noise`.

    Args:
        x0, noise: [B, F, C, H, W].
        timestep: [B] or [B, F], in [0, 1000].
        schedule, shift: how the timestep becomes a sigma, see `timestep_to_sigma`.

    Returns:
        noisy: [B, F, C, H, W], x0's dtype.

    Example:
        >>> import torch
        >>> add_noise(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([250.0]))
        tensor([[0.2500]])
    """
    return interpolate(x0, noise, timestep_to_sigma(timestep, schedule, shift))


def _target_example(batch: int, randn) -> dict:
    return {"x0": randn(batch, 3, 4, 2, 2), "noise": randn(batch, 3, 4, 2, 2)}


@transform(out="target", kind="per_sample", example=_target_example)
def flow_target(x0: Tensor, noise: Tensor):
    """What a flow model learns: `noise - x0`.

    Args:
        x0, noise: [B, F, C, H, W].

    Returns:
        target: [B, F, C, H, W].

    Example:
        >>> import torch
        >>> flow_target(torch.zeros(1), torch.ones(1))
        tensor([1.])
    """
    return noise - x0


def _read_example(batch: int, randn) -> dict:
    return {name: randn(batch, 3, 4, 2, 2) for name in ("noisy", "flow")} | {"timestep": randn(batch, 3).sigmoid() * 1000}


@transform(out="x0", kind="per_sample", example=_read_example)
def read_x0(noisy: Tensor, flow: Tensor, timestep: Tensor, *, schedule: ScheduleName = "continuous", shift: float = 1.0):
    """The clean latents that a flow stands for: `x_t - sigma flow`.

    Args:
        noisy, flow: [B, F, C, H, W].
        timestep: [B] or [B, F], in [0, 1000].
        schedule, shift: how the timestep becomes a sigma, see `timestep_to_sigma`.

    Returns:
        x0: [B, F, C, H, W].

    Example:
        >>> import torch
        >>> read_x0(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([250.0]))
        tensor([[0.7500]])
    """
    return flow_to_x0(noisy, flow, timestep_to_sigma(timestep, schedule, shift))


def _follow_example(batch: int, randn) -> dict:
    return _read_example(batch, randn) | {"next_timestep": randn(batch, 3).sigmoid() * 1000}


@transform(out="stepped", kind="per_sample", example=_follow_example)
def follow_flow(noisy: Tensor, flow: Tensor, timestep: Tensor, next_timestep: Tensor):
    """One Euler step along a flow, each frame between its own two timesteps.

    Args:
        noisy, flow: [B, F, C, H, W].
        timestep, next_timestep: [B] or [B, F], in [0, 1000].

    Returns:
        stepped: [B, F, C, H, W], at `next_timestep`.

    Source: flow matching, arXiv 2210.02747, sampled with Euler's method.

    Example:
        >>> import torch
        >>> follow_flow(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([750.0]), torch.tensor([500.0]))
        tensor([[0.7500]])
    """
    sigma, following = timestep_to_sigma(timestep), timestep_to_sigma(next_timestep)
    return noisy + (expand_sigma(following, noisy) - expand_sigma(sigma, noisy)) * flow
