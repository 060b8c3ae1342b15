"""Forward mode through a model port: how its prediction changes along the flow's own path."""

from __future__ import annotations

import torch
from torch import Tensor

from sftk.functional.attention import exact_derivatives
from sftk.functional.predict import Denoiser
from sftk.functional.schedule import TIMESTEPS


def flow_tangent(
    denoiser: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    velocity: Tensor,
    interval: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A model's prediction and its total derivative by sigma while the sample moves with `velocity`.

    `d/ds F(x_s, s) = velocity dF/dx + dF/ds` by `torch.func.jvp`, at some twice the cost of a forward pass, with `math`
    attention and without gradient.

    Args:
        denoiser: the model port.
        noisy: [B, F, C, H, W].
        timestep: [B, F], in [0, 1000].
        prompt_embeds: [B, L, D].
        velocity: [B, F, C, H, W], dx/ds.
        interval: [B, F], timesteps from an end that stays put up to `timestep`, for a model that is told of it; it grows with
            the timestep.

    Returns:
        flow, tangent: [B, F, C, H, W] each. Neither carries gradient.

    Source: forward-mode differentiation as in MeanFlow, arXiv 2505.13447, eq. 8, and sCM, arXiv 2410.11081, section 4.2.

    Example:
        >>> from sftk.functional.predict import toy_denoiser
        >>> x, t = torch.zeros(1, 3, 4, 2, 2), torch.zeros(1, 3)
        >>> flow, tangent = flow_tangent(toy_denoiser, x, t, torch.zeros(1, 2, 8), torch.ones_like(x))
        >>> tangent.unique()  # 0.5 tanh' from the latents, 0.1 from the time
        tensor([0.6000])
    """
    times = (timestep,) if interval is None else (timestep, interval)

    def predict(x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        return denoiser(x, t, prompt_embeds, interval=rest[0])[0] if rest else denoiser(x, t, prompt_embeds)[0]

    # Forward mode refuses expanded tensors, and timesteps that all frames share are such.
    primals = tuple(x.contiguous() for x in (noisy, *times))
    tangents = (velocity.to(noisy.dtype).contiguous(), *(torch.full_like(t, TIMESTEPS) for t in primals[1:]))
    with torch.no_grad(), exact_derivatives():
        flow, tangent = torch.func.jvp(predict, primals, tangents)  # pyright: ignore[reportAssignmentType]
    return flow, tangent
