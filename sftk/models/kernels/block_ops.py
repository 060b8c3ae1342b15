"""A block's operations by the kernels of this folder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sftk.core.numerics import rounds_as_with_gradient
from sftk.models.block_ops import BlockOps
from sftk.models.held_linear import HeldLinear
from sftk.models.kernels.gelu_bias import gelu_bias
from sftk.models.kernels.norm_rope import norm_rope
from sftk.models.kernels.residual_norm import modulated_norm, residual_norm
from sftk.models.layers import RMSNorm


class TritonOps(BlockOps):
    """For CUDA in half precision; no second derivative, no forward mode.

    Their launches cost the host more than those of compiled kernels, so that short passes with gradient do not gain.
    """

    worth = 16384

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return modulated_norm(x, shift, scale, eps)

    def norm_rope(self, q: Tensor, k: Tensor, norms: tuple[nn.Module, nn.Module], rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        norm_q, norm_k = norms
        assert isinstance(norm_q, RMSNorm) and isinstance(norm_k, RMSNorm)
        return list(norm_rope(q, k, norm_q.weight, norm_k.weight, *rope, norm_q.eps))

    def gated_norm(self, x: Tensor, y: Tensor, gate: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        assert isinstance(norm, nn.LayerNorm)
        weight, bias = (parameter.float().expand(gate.shape) for parameter in (norm.weight, norm.bias))
        return residual_norm(x, y, gate, bias, weight - 1, norm.eps)

    def added_modulated(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return residual_norm(x, y, None, shift, scale, eps)

    def linear_gelu(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not rounds_as_with_gradient():
            return super().linear_gelu(layer, x)
        if isinstance(layer, HeldLinear):
            return gelu_bias(layer.product(x, layer.bias.detach()), layer.bias)
        if type(layer) is nn.Linear:
            return gelu_bias(F.linear(x, layer.weight, layer.bias.detach()), layer.bias)
        return super().linear_gelu(layer, x)
