"""R1 and R2: the penalty on the gradient of a discriminator's logits, exact or by a finite difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sftk.core.transform import transform
from sftk.functional.attention import exact_derivatives
from sftk.functional.classify import Discriminator, classify, classify_example
from sftk.functional.keys import Key, normal_like
from sftk.functional.predict import Denoiser
from sftk.objectives.dmd import at_least_float32

Penalty = Literal["finite_difference", "exact"]


def _penalty_example(batch: int, randn) -> dict:
    return classify_example(batch, randn) | {
        "logits": randn(batch, 1),
        "key": Key(seed=3, samples=tuple(range(batch))),
        "weight": 2.0,
        "sigma": 0.1,
    }


def _check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["sigma"] <= 0:
        yield "sigma", f"a perturbation is above 0, found {options['sigma']}"
    if options["weight"] < 0:
        yield "weight", f"a penalty's weight is at least 0, found {options['weight']}"


@transform(
    out=("loss", "loss_weight"),
    kind="reduced",
    models=("denoiser", "discriminator"),
    example=_penalty_example,
    check=_check,
    whole=lambda options: options["weight"] > 0 and options["penalty"] == "exact",
)
def gradient_penalty(
    denoiser: Denoiser,
    discriminator: Discriminator,
    noisy: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    logits: Tensor,
    key: Key,
    *,
    weight: float = 0.0,
    penalty: Penalty = "finite_difference",
    sigma: float = 0.01,
    name: str = "penalty_noise",
):
    """`weight` times the squared norm of the logits' gradient with respect to the noisy latents: R1 on real ones, R2 on fake.

    The papers write gamma / 2 for `weight`.

    Args:
        noisy, timestep, prompt_embeds: as for `classify`.
        logits: [B, K], what `classify` gave there.
        key: draws the perturbation.
        weight: 0 makes no pass and gives a loss of 0.
        penalty: `finite_difference` classifies once more, at the latents plus sigma times noise; `exact` differentiates twice,
            with `math` attention and without compilation, and refuses models whose weights are sharded over processes.
        sigma: size of the perturbation.
        name: tells draws of one step apart.

    Returns:
        loss: [] float32, the sum over logits. loss_weight: [], the number of logits.

    Source: R1 and R2, arXiv 1801.04406, eq. 9 and 10; approximated, arXiv 2501.08316 (Seaweed-APT), eq. 5.

    Example:
        >>> loss, count = gradient_penalty(**_penalty_example(2, torch.randn) | {"penalty": "exact"})
        >>> loss.shape, count
        (torch.Size([]), tensor(2.))
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    count = torch.full((), float(logits.numel()), device=logits.device, dtype=dtype)
    if weight == 0:
        return torch.zeros((), device=logits.device, dtype=dtype), count
    if penalty == "exact":
        twice = torch.is_grad_enabled()
        with exact_derivatives(), torch.enable_grad():
            latents = noisy.detach().requires_grad_(True)
            found = classify(denoiser, discriminator, latents, timestep, prompt_embeds)
            grads = [torch.autograd.grad(column.sum(), latents, create_graph=twice, retain_graph=True)[0] for column in found.T]
        return weight * sum(grad.to(dtype).square().sum() for grad in grads), count
    noise = normal_like(key, name, noisy)
    perturbed = classify(denoiser, discriminator, noisy + sigma * noise, timestep, prompt_embeds)
    return weight * finite_difference(logits, perturbed, sigma), count


def finite_difference(logits: Tensor, perturbed_logits: Tensor, sigma: float) -> Tensor:
    """Sum of `((perturbed - logits) / sigma)^2`.

    On average over standard normal perturbations, and as sigma goes to 0, the squared norm of the logits' gradient.

    Args:
        logits, perturbed_logits: [B, K], at some latents and at these plus sigma times noise.

    Example:
        >>> finite_difference(torch.zeros(1, 1), torch.ones(1, 1), 0.5)
        tensor(4.)
    """
    return ((at_least_float32(perturbed_logits) - at_least_float32(logits)) / sigma).square().sum()
