"""Linear layers that are trained in fp8: forward product and the input's gradient in fp8, the weight's gradient as it was.

Operators of ours, which compiled blocks, activation checkpoints and CUDA graphs take as they are. All factors are e4m3 with a
scale for each row, gradients among them: with a scale of its own a row needs e4m3's precision more than e5m2's range. That is
the recipe "row-wise with the weight's gradient in high precision" of torchao.float8 (`Float8LinearRecipeName`), but that
scales stay as they are instead of going down to powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sftk.functional.fp8_linear import fp8_product
from sftk.functional.fp8_rounding import by_columns, by_rows, fp8_rows
from sftk.functional.packed import Packed
from sftk.models.precision import autocast_to


@torch.library.custom_op("sftk::fp8_linear", mutates_args=())
def fp8_linear_rows(x: Tensor, codes: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in fp8, and its gradients.

    Args:
        x: [..., K], kept for the gradient of the weight alone. codes, scale: `fp8_rows(x)`.
        weight: [N, K], rounded here, in whatever precision it has. bias: [N].

    Returns:
        [..., N] of x's dtype.

    Source: see the module.

    Example:
        >>> x, weight = torch.ones(2, 16), torch.full((16, 16), 0.25, requires_grad=True)
        >>> y = fp8_linear_rows(x, *fp8_rows(x), weight, None)
        >>> y.unique(), torch.autograd.grad(y.sum(), weight)[0].unique()
        (tensor([4.], grad_fn=<Unique2Backward0>), tensor([2.]))
    """
    found = fp8_product(Packed(codes, scale), by_rows(weight), bias)
    return found.to(x.dtype).unflatten(0, x.shape[:-1])


@fp8_linear_rows.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("sftk::fp8_linear_input", mutates_args=())
def fp8_linear_input(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad @ weight` in fp8: the gradient of a linear layer's input.

    Args:
        grad: [..., N]. weight: [N, K]; each of its columns has a scale.

    Returns:
        [..., K] of grad's dtype.

    Source: see the module.

    Example:
        >>> fp8_linear_input(torch.ones(1, 16), torch.full((16, 2), 0.25))
        tensor([[4., 4.]])
    """
    found = fp8_product(by_rows(grad.flatten(0, -2)), by_columns(weight))
    return found.to(grad.dtype).unflatten(0, grad.shape[:-1])


@fp8_linear_input.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _outer(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight, in the precision of the activations."""
    return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, _, _, of_weight, of_bias = ctx.needs_input_grad
    return (
        fp8_linear_input(grad, weight) if of_x else None,
        None,
        None,
        _outer(grad, x, weight) if of_weight else None,
        grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if of_bias else None,
    )


def _remember_input(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For second derivatives: the two operators are each other's."""
    first, weight = ctx.saved_tensors
    of_first, of_weight = ctx.needs_input_grad
    return fp8_training_linear(grad, weight) if of_first else None, _outer(first, grad, weight) if of_weight else None


fp8_linear_rows.register_autograd(_gradients, setup_context=_remember)
fp8_linear_input.register_autograd(_gradients_input, setup_context=_remember_input)


def fp8_training_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: Packed | None = None) -> Tensor:
    """`F.linear` whose forward product and whose gradient of x are computed in fp8, with a scale for each row.

    The gradients of weight and bias are those of `F.linear`, computed in the dtype of x from x as it is. Under autocast x is
    taken in autocast's dtype, the weight as it is. No forward-mode derivative.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N]. K and N are multiples of `MULTIPLE` on CUDA.
        rows: x in fp8, from `fp8_rows` (under autocast of x in its dtype), where it was rounded for another layer already.

    Returns:
        [..., N], of autocast's dtype or x's.

    Source: arXiv 2209.05433, section 3; the recipe of torchao.float8 called `rowwise_with_gw_hp`.

    Example:
        >>> x = torch.ones(1, 16, requires_grad=True)
        >>> y = fp8_training_linear(x, torch.full((32, 16), 0.5), torch.ones(32))
        >>> y.mean().item(), torch.autograd.grad(y.sum(), x)[0].unique()
        (9.0, tensor([16.]))
    """
    x = autocast_to(x)
    codes, scale = fp8_rows(x.detach()) if rows is None else rows[:2]
    return fp8_linear_rows(x, codes, scale, weight, bias)
