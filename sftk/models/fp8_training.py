"""Linear layers that are trained in fp8: forward product and the input's gradient in fp8, the weight's gradient as it was.

Operators of ours, which compiled blocks, activation checkpoints and CUDA graphs take as they are. All factors are e4m3 with a
scale for each row, gradients among them: with a scale of its own a row needs e4m3's precision more than e5m2's range. That is
the recipe "row-wise with the weight's gradient in high precision" of torchao.float8 (`Float8LinearRecipeName`), but that
scales stay as they are instead of going down to powers of two.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from sftk.functional.fp8_linear import fp8_product
from sftk.functional.packed import DTYPES, Packed, pack


@functools.cache
def _kernels() -> Any:
    """The Triton kernels that round, or None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from sftk.models.kernels import fp8_rounding

    return fp8_rounding


def by_rows(values: Tensor) -> Packed:
    """Rounds to fp8 with a scale for each row: on CUDA by one kernel, elsewhere (and without Triton) by `pack`.

    Args:
        values: [M, K], floating-point.

    Returns:
        Codes [M, K]; scales [M, 1], float32 on CUDA, float32 at least elsewhere.

    Source: row-wise scaling, arXiv 2209.05433, section 3.

    Example:
        >>> by_rows(torch.tensor([[896.0, 2.0]])).codes.float()
        tensor([[448.,   1.]])
    """
    if values.is_cuda and (kernels := _kernels()) is not None:
        return kernels.round_rows(values)
    return _packed(values)


def by_columns(values: Tensor) -> Packed:
    """`by_rows` of the transpose, which is not made on CUDA.

    Args:
        values: [N, K], floating-point.

    Returns:
        Codes [K, N], contiguous; scales [K, 1].

    Source: row-wise scaling, arXiv 2209.05433, section 3.

    Example:
        >>> by_columns(torch.tensor([[896.0, 2.0]])).codes.float().tolist()
        [[448.0], [448.0]]
    """
    if values.is_cuda and (kernels := _kernels()) is not None:
        return kernels.round_columns(values)
    return _packed(values.t().contiguous())


def _packed(values: Tensor) -> Packed:
    rows = pack(values, "fp8")
    return Packed(rows.codes, rows.scale.to(_scales(values)))


def _scales(values: Tensor) -> torch.dtype:
    """float32, as products on a GPU take it; the reference computes float64 in float64."""
    return torch.float32 if values.is_cuda else torch.promote_types(values.dtype, torch.float32)


@torch.library.custom_op("sftk::fp8_rows", mutates_args=())
def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds tokens to fp8. An operator apart from the product: where several layers take one input, a compiler rounds once.

    Args:
        x: [..., K], floating-point.

    Returns:
        codes: [M, K] float8_e4m3fn, M tokens. scale: [M, 1] float32; on a CPU x's dtype if that is wider.

    Source: row-wise scaling, arXiv 2209.05433, section 3.

    Example:
        >>> codes, scale = fp8_rows(torch.tensor([[896.0, 2.0]]))
        >>> codes.float(), scale
        (tensor([[448., 1.]]), tensor([[2.]]))
    """
    rows = by_rows(x.flatten(0, -2))
    return rows.codes, rows.scale


@fp8_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.flatten(0, -2)
    return flat.new_empty(flat.shape, dtype=DTYPES["fp8"]), flat.new_empty((flat.shape[0], 1), dtype=_scales(x))


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


def fp8_training_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` whose forward product and whose gradient of x are computed in fp8, with a scale for each row.

    The gradients of weight and bias are those of `F.linear`, computed in the dtype of x from x as it is. Under autocast x is
    taken in autocast's dtype, the weight as it is. No forward-mode derivative.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N]. K and N are multiples of `MULTIPLE` on CUDA.

    Returns:
        [..., N], of autocast's dtype or x's.

    Source: arXiv 2209.05433, section 3; the recipe of torchao.float8 called `rowwise_with_gw_hp`.

    Example:
        >>> x = torch.ones(1, 16, requires_grad=True)
        >>> y = fp8_training_linear(x, torch.full((32, 16), 0.5), torch.ones(32))
        >>> y.mean().item(), torch.autograd.grad(y.sum(), x)[0].unique()
        (9.0, tensor([16.]))
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return fp8_linear_rows(x, *fp8_rows(x.detach()), weight, bias)
