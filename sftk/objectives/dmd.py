"""Distribution matching distillation: the difference of two scores as a gradient on the student's samples."""

from __future__ import annotations

import torch
from torch import Tensor

from sftk.core.transform import transform


def _gradient_example(batch: int, randn) -> dict:
    return {name: randn(batch, 3, 4, 2, 2) for name in ("x0", "fake_x0", "real_x0")}


def _loss_example(batch: int, randn) -> dict:
    mask = (randn(batch, 3) > 0).index_fill(1, torch.tensor([0]), True)
    return {"x0": randn(batch, 3, 4, 2, 2), "grad": randn(batch, 3, 4, 2, 2), "gradient_mask": mask}


def per_sample_normalizer(x0: Tensor, real_x0: Tensor, guard: bool = True) -> Tensor:
    """`mean |x0 - real_x0|` of each sample, which makes gradients of different noise levels comparable.

    Args:
        x0, real_x0: [B, ...].
        guard: keep it above 1e-4 of the mean |real_x0| (and above the dtype's smallest step), so that it cannot vanish.

    Returns:
        [B, 1, ...], without gradient.

    Source: DMD, arXiv 2311.18828, eq. 8.

    Example:
        >>> per_sample_normalizer(torch.ones(1, 4), torch.full((1, 4), 3.0))
        tensor([[2.]])
    """
    axes = tuple(range(1, x0.dim()))
    with torch.no_grad():
        size = (x0 - real_x0).abs().mean(dim=axes, keepdim=True)
        if guard:
            floor = 1e-4 * real_x0.abs().mean(dim=axes, keepdim=True) + torch.finfo(size.dtype).eps
            size = torch.maximum(size, floor)
    return size


@transform(out="grad", kind="per_sample", example=_gradient_example)
def dmd_gradient(x0: Tensor, fake_x0: Tensor, real_x0: Tensor, *, normalize: bool = True, guard: bool = True):
    """The DMD gradient with respect to x0: `(fake - real) / mean |x0 - real|`.

    Args:
        x0: [B, F, C, H, W], the student's sample.
        fake_x0: the critic's prediction at a noisy version of it.
        real_x0: the teacher's prediction there, guided.
        normalize: divide by the normaliser of each sample.
        guard: keep the normaliser from vanishing; without it NaN becomes 0, as in the public code.

    Returns:
        grad: [B, F, C, H, W] float32 (float64 for float64 inputs), without history.

    Source: DMD, arXiv 2311.18828, eq. 7 and 8; Self-Forcing, arXiv 2506.08009, section 3.3.

    Example:
        >>> one = torch.ones(1, 2)
        >>> dmd_gradient(one, 2 * one, 3 * one)
        tensor([[-0.5000, -0.5000]])
    """
    x0, fake_x0, real_x0 = (at_least_float32(x.detach()) for x in (x0, fake_x0, real_x0))
    grad = fake_x0 - real_x0
    if normalize:
        grad = grad / per_sample_normalizer(x0, real_x0, guard)
    return grad if guard else torch.nan_to_num(grad)


@transform(out=("loss", "loss_weight"), kind="reduced", example=_loss_example)
def surrogate_loss(x0: Tensor, grad: Tensor, gradient_mask: Tensor | None = None):
    """A loss whose gradient with respect to x0 is a given one: `1/2 mean (x0 - stopgrad(x0 - grad))^2`.

    Args:
        x0: [B, F, C, H, W], with history.
        grad: the same shape.
        gradient_mask: [B, F] or x0's shape, bool; frames (or elements) that enter the loss.

    Returns:
        loss: [] float32, the sum. loss_weight: [], how many elements it sums.

    Source: DMD, arXiv 2311.18828, section 3.2 (implementation as a mean squared error).

    Example:
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> loss, weight = surrogate_loss(x, torch.tensor([[1.0, 2.0]]))
        >>> (loss / weight).item(), torch.autograd.grad(loss / weight, x)[0]
        (1.25, tensor([[0.5000, 1.0000]]))
    """
    x0, grad = at_least_float32(x0), at_least_float32(grad).detach()
    weight = element_mask(gradient_mask, x0)
    # The value is that of the squared error; writing it as value plus a zero with the right gradient loses no digits.
    loss = (weight * grad * grad).sum() / 2 + (weight * grad * (x0 - x0.detach())).sum()
    return loss, weight.sum()


@transform(out="gradient_norm", kind="reduced", example=lambda batch, randn: {"grad": randn(batch, 3, 4, 2, 2)})
def mean_magnitude(grad: Tensor):
    """Mean absolute value, a number to watch.

    Args:
        grad: any shape.

    Returns:
        gradient_norm: [] float32.

    Example:
        >>> mean_magnitude(torch.tensor([1.0, -3.0]))
        tensor(2.)
    """
    return at_least_float32(grad.detach()).abs().mean()


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is float64. Losses are never computed in half precision.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def element_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask as weights of `like`'s shape and dtype; None is all ones.

    Args:
        mask: [B], [B, F] or `like`'s shape, bool or weights.

    Example:
        >>> element_mask(torch.tensor([[True, False]]), torch.zeros(1, 2, 3)).sum()
        tensor(3.)
    """
    if mask is None:
        return torch.ones_like(like)
    return mask.to(like.dtype).reshape(mask.shape + (1,) * (like.dim() - mask.dim())).expand_as(like)
