"""A linear layer and its GELU in one kernel, for passes that keep nothing for a backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftk.core.numerics import rounds_as_with_gradient
from sftk.functional.attention import is_exact
from sftk.models.held_linear import HalfLinear


@torch.library.custom_op("sftk::linear_gelu", mutates_args=(), device_types="cuda")
def _fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuBLAS applies the activation to what it still holds in float32. An operator, since Inductor would take it apart."""
    flat = torch.ops.aten._addmm_activation.default(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:-1])


@_fused.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """`gelu(layer(x))`, GELU in its tanh form: in one kernel where no gradient is kept, on CUDA in half precision.

    The activation of a wide layer takes as long as a third of its product when a kernel of its own reads and writes it.

    Args:
        layer: `nn.Linear`; of what replaces one (a quantised layer, say) the module is called.
        x: [..., in].

    Returns:
        [..., out].

    Source: GELU, arXiv 1606.08415, section 2.

    Example:
        >>> layer, x = nn.Linear(2, 3), torch.ones(1, 2)
        >>> torch.equal(linear_gelu(layer, x), F.gelu(layer(x), approximate="tanh"))
        True
    """
    if x.is_cuda and not rounds_as_with_gradient() and not is_exact():
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        weight, bias = _plain(layer, dtype)
        if weight is not None and bias is not None and dtype in (torch.bfloat16, torch.float16):
            return _fused(x.to(dtype), weight, bias)
    return F.gelu(layer(x), approximate="tanh")


def _plain(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer that multiplies by them and does nothing else."""
    if isinstance(layer, HalfLinear):
        return layer.weights(dtype)
    if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.bias is not None:
        return layer.weight.to(dtype), layer.bias.to(dtype)
    return None, None
