"""Optimisers and learning-rate courses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sftk.errors import SpecError
from sftk.runtime.optim_8bit import make_adamw_8bit
from sftk.runtime.shards import local, whole
from sftk.spec.optimizer import OptimizerSection


def make_optimizer(parameters: Mapping[str, nn.Parameter], section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimiser that a recipe describes, with its groups: AdamW with PyTorch's fused kernel, or with 8-bit states.

    Args:
        parameters: by the names that `groups` match.
        section: of the role.

    Raises:
        SpecError: a group matches no parameter.
        SftkError: an 8-bit optimiser without torchao.

    Example:
        >>> from sftk.spec.optimizer import OptimizerGroup
        >>> section = OptimizerSection(lr=1e-3, groups=(OptimizerGroup(match=("*.bias",), weight_decay=0.0),))
        >>> made = make_optimizer(dict(nn.Linear(2, 1).named_parameters(prefix="head")), section)
        >>> [(group["weight_decay"], len(group["params"])) for group in made.param_groups]
        [(0.01, 1), (0.0, 1)]
    """
    groups = parameter_groups(parameters, section)
    if section.use == "adamw_8bit":
        made = make_adamw_8bit(groups, section)
    else:
        made = torch.optim.AdamW(
            groups, lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, fused=True
        )
    made.register_step_post_hook(_count_changes)
    return made


def _count_changes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Counts a change of the weights, which PyTorch's fused kernel does not: what is kept of them is made anew by that."""
    torch.autograd.graph.increment_version([local(p) for group in optimizer.param_groups for p in group["params"]])


def parameter_groups(parameters: Mapping[str, nn.Parameter], section: OptimizerSection) -> list[dict[str, Any]]:
    """Parameters that no group of the section matches, then those of each; `lr_scale` says by what the rate is multiplied."""
    taken: list[list[nn.Parameter]] = [[] for _ in section.groups]
    rest: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        places = (i for i, group in enumerate(section.groups) if any(fnmatchcase(name, text) for text in group.match))
        place = next(places, None)
        (rest if place is None else taken[place]).append(parameter)
    for group, found in zip(section.groups, taken, strict=True):
        if not found:
            raise SpecError(
                f"the optimiser's group {list(group.match)} matches no parameter, or none that earlier groups leave; "
                f"names are such as {', '.join(list(parameters)[:3])}"
            )
    made: list[dict[str, Any]] = [{"params": rest, "lr_scale": 1.0}] if rest else []
    for group, found in zip(section.groups, taken, strict=True):
        decay = section.weight_decay if group.weight_decay is None else group.weight_decay
        made.append({"params": found, "lr_scale": group.lr_scale, "weight_decay": decay})
    return made


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group, times its `lr_scale`.

    Example:
        >>> made = make_optimizer({"weight": nn.Parameter(torch.ones(1))}, OptimizerSection(lr=1.0))
        >>> set_learning_rate(made, 0.5)
        >>> made.param_groups[0]["lr"]
        0.5
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["lr_scale"])
        else:
            group["lr"] = rate * group["lr_scale"]


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
    """Divides summed gradients by their weight, clips them and steps; with a fused optimiser without reading anything back.

    A gradient that is not finite leaves the weights as they are (PyTorch's own `found_inf`); the caller sees it in the norm.

    Args:
        optimizer: its parameters hold gradients of a loss that is summed over all ranks, sharded or whole.
        weight: [] what the sum is divided by.
        clip: largest norm, or None.

    Returns:
        [] norm of the mean gradient before clipping.

    Example:
        >>> p = nn.Parameter(torch.zeros(1))
        >>> optimizer = make_optimizer({"p": p}, OptimizerSection(lr=0.5, weight_decay=0.0))
        >>> p.grad = torch.tensor([8.0])
        >>> apply_gradients(optimizer, torch.tensor(4.0), clip=None), round(p.item(), 4)
        (tensor(2.), -0.5)
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)) / weight
    scale = weight if clip is None else weight * torch.clamp(norm / clip, min=1.0)
    finite = torch.isfinite(norm)
    if not optimizer.defaults.get("fused"):
        _step_unfused(optimizer, gradients, scale, finite)
        return norm
    optimizer.grad_scale = torch.where(finite, scale, torch.ones_like(scale)).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _step_unfused(optimizer: torch.optim.Optimizer, gradients: list[Tensor], scale: Tensor, finite: Tensor) -> None:
    """Without a kernel that scales and skips by itself, the host has to know whether the gradient is finite."""
    if bool(finite):
        torch._foreach_div_([local(grad) for grad in gradients], scale)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
