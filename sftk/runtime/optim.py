"""Optimisers and learning-rate courses."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sftk.runtime.shards import whole
from sftk.spec.schema import OptimizerSection


def make_optimizer(parameters: Iterable[nn.Parameter], section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW as a recipe describes it, with PyTorch's fused kernel.

    Example:
        >>> make_optimizer([nn.Parameter(torch.ones(1))], OptimizerSection(lr=1e-3)).defaults["lr"]
        0.001
    """
    return torch.optim.AdamW(
        parameters, lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, fused=True
    )


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The learning rate at a step.

    Args:
        section: peak, warmup and decay.
        step: counted from 0.
        steps: of the whole stage.

    Example:
        >>> section = OptimizerSection(lr=1.0, schedule="linear", decay_from=0.5)
        >>> [learning_rate(section, step, 8) for step in (0, 4, 6)]
        [1.0, 1.0, 0.5]
    """
    rate = section.lr
    if step < section.warmup:
        rate *= (step + 1) / section.warmup
    start = section.decay_from * steps
    if section.schedule != "constant" and step >= start and steps > start:
        done = min(1.0, (step - start) / (steps - start))
        shape = 1 - done if section.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        rate *= section.final + (1 - section.final) * shape
    return rate


@torch.no_grad()
def apply_gradients(optimizer: torch.optim.Optimizer, weight: Tensor, clip: float | None) -> Tensor:
    """Divides summed gradients by their weight, clips them and steps, without reading anything back.

    A gradient that is not finite leaves the weights as they are (PyTorch's own `found_inf`); the caller sees it in the norm.

    Args:
        optimizer: fused; its parameters hold gradients of a loss that is summed over all ranks, sharded or whole.
        weight: [] what the sum is divided by.
        clip: largest norm, or None.

    Returns:
        [] norm of the mean gradient before clipping.

    Example:
        >>> p = nn.Parameter(torch.zeros(1))
        >>> optimizer = make_optimizer([p], OptimizerSection(lr=0.5, weight_decay=0.0))
        >>> p.grad = torch.tensor([8.0])
        >>> apply_gradients(optimizer, torch.tensor(4.0), clip=None), round(p.item(), 4)
        (tensor(2.), -0.5)
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)) / weight
    scale = weight if clip is None else weight * torch.clamp(norm / clip, min=1.0)
    finite = torch.isfinite(norm)
    optimizer.grad_scale = torch.where(finite, scale, torch.ones_like(scale)).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
