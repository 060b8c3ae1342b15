"""What a block computes between its products: norms, rotation, modulation, gated residuals, activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sftk.models.held_linear import HeldLinear
from sftk.models.linear_gelu import linear_gelu
from sftk.models.precision import upcast
from sftk.models.rope import rotate


class BlockOps:
    """The operations as PyTorch has them; a subclass may compute them otherwise, rounded at the same places.

    Example:
        >>> import torch
        >>> x, gate = torch.ones(1, 4, 8), torch.ones(1, 2, 8)
        >>> total, normed = BlockOps().gated_norm(x, x, gate, nn.Identity())
        >>> total.mean(), normed.shape
        (tensor(2.), torch.Size([1, 4, 8]))
    """

    worth = 0
    """Tokens of a pass with gradient from which they are used instead of the plain ones."""

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """`(1 + scale) layer_norm(x) + shift`, see the function of this name."""
        return modulate(x, shift, scale, eps)

    def norm_rope(self, q: Tensor, k: Tensor, norms: tuple[nn.Module, nn.Module], rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Queries and keys [B, L, width], normed and rotated: [B, L, H, D]."""
        dim = 2 * rope[0].shape[-1]
        return [rotate(norm(x).unflatten(-1, (-1, dim)), *rope) for norm, x in zip(norms, (q, k), strict=True)]

    def gated_norm(self, x: Tensor, y: Tensor, gate: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """`x + gate y` with a gate [B, F, width] for each frame, and its norm."""
        total = gated(x, y, gate)
        return total, norm(total).to(total.dtype)

    def added_modulated(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`x + y`, and its modulated norm, see `modulate`."""
        total = x + y
        return total, modulate(total, shift, scale, eps)

    def linear_gelu(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`gelu(layer(x))`, GELU in its tanh form."""
        return linear_gelu(layer, x)

    def feed_forward(self, ffn: nn.Sequential, x: Tensor) -> Tensor:
        """Both linear layers, GELU between them."""
        first, _, last = ffn
        if isinstance(last, HeldLinear) and last.takes_gelu:
            return last.after_gelu(first(x))
        return last(self.linear_gelu(first, x))


PLAIN = BlockOps()


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate y` of [B, L, width] with a gate [B, F, width] for each frame, in float32, back to x's dtype."""
    by_frame = upcast(y).unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    return (upcast(x) + by_frame.flatten(1, 2)).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of [B, L, width], then `(1 + scale) x + shift` with [B, F, width], in float32; x's dtype."""
    y = F.layer_norm(upcast(x), x.shape[-1:], eps=eps)
    by_frame = y.unflatten(1, (shift.shape[1], -1)) * (1 + scale[:, :, None]) + shift[:, :, None]
    return by_frame.flatten(1, 2).to(x.dtype)
