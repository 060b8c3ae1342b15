"""What a transformer block does between its products: as the model computes it, and by a kernel of sftk.models.kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from sftk.models.block_ops import modulate
from sftk.models.layers import rms_norm
from sftk.models.precision import upcast
from sftk.models.rope import _turn_halves, rotate

EPS = 1e-6
Form = Callable[..., tuple[Tensor, ...]]


@attrs.frozen(kw_only=True)
class Sizes:
    """Of a block's input: batch, frames, tokens of each, heads, channels of each, channels inside the feed-forward layer."""

    batch: int = 1
    frames: int
    tokens_per_frame: int
    heads: int
    dim: int
    hidden: int

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def width(self) -> int:
        return self.heads * self.dim


@attrs.frozen
class Case:
    """Forms of one piece. `make` draws what lies in half precision, and what is float32; `fixed` inputs take no gradient."""

    plain: Form
    fused: Form
    make: Callable[[Sizes, torch.device], tuple[list[Tensor], list[Tensor]]]
    others: Mapping[str, Form] = attrs.field(factory=dict)
    fixed: int = 0
    """How many inputs, at the end."""
    differentiable: bool = True


def draw(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal float32, the same every time."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def norm_rope_plain(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    shape = (-1, 2 * cos.shape[-1])
    return tuple(rotate(rms_norm(x, w, EPS).unflatten(-1, shape), cos, sin) for x, w in ((q, weight_q), (k, weight_k)))


def norm_rope_halves(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Even channels apart from odd ones, as without a compiler."""
    found = (rms_norm(x, w, EPS).unflatten(-1, (-1, cos.shape[-1], 2)).to(cos.dtype) for x, w in ((q, weight_q), (k, weight_k)))
    return tuple(_turn_halves(pairs, cos, sin).flatten(-2).to(q.dtype) for pairs in found)


def norm_rope_fused(*inputs: Tensor, **tile: int) -> tuple[Tensor, ...]:
    from sftk.models.kernels.norm_rope import norm_rope

    return norm_rope(*inputs, EPS, **tile)


def norm_rope_inputs(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    tokens, channels = (sizes.batch, sizes.tokens, sizes.width), (sizes.width,)
    q, k, weight_q, weight_k, angle = draw(device, tokens, tokens, channels, channels, (sizes.tokens, 1, sizes.dim // 2))
    return [q, k], [weight_q, weight_k, angle.cos(), angle.sin()]


def residual_plain(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    by_frame = upcast(y).unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    total = (upcast(x) + by_frame.flatten(1, 2)).to(x.dtype)
    return total, modulate(total, shift, scale, EPS)


def residual_fused(*inputs: Tensor, **tile: int) -> tuple[Tensor, ...]:
    from sftk.models.kernels.residual_norm import residual_norm

    return residual_norm(*inputs, EPS, **tile)


def residual_inputs(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Tables of a frame as the model has them: parts of one tensor, not contiguous."""
    tokens = (sizes.batch, sizes.tokens, sizes.width)
    x, y, table = draw(device, tokens, tokens, (sizes.batch, sizes.frames, 6, sizes.width))
    return [x, y], list(table.unbind(2)[:3])


def modulated_plain(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (modulate(x, shift, scale, EPS),)


def modulated_fused(x: Tensor, shift: Tensor, scale: Tensor, **tile: int) -> tuple[Tensor, ...]:
    from sftk.models.kernels.residual_norm import modulated_norm

    return (modulated_norm(x, shift, scale, EPS, **tile),)


def modulated_inputs(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    (x, _), (_, shift, scale) = residual_inputs(sizes, device)
    return [x], [shift, scale]


def weighted_plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + y
    return total, F.layer_norm(upcast(total), weight.shape, weight, bias, EPS).to(x.dtype)


def weighted_fused(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, **tile: int) -> tuple[Tensor, ...]:
    from sftk.models.kernels.residual_norm import residual_norm

    shift, scale = (v.expand(x.shape[0], 1, -1) for v in (bias, weight - 1))
    return residual_norm(x, y, None, shift, scale, EPS, **tile)


def weighted_inputs(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    tokens = (sizes.batch, sizes.tokens, sizes.width)
    x, y, weight, bias = draw(device, tokens, tokens, (sizes.width,), (sizes.width,))
    return [x, y], [weight, bias]


def gelu_plain(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.gelu(x + (bias - bias.detach()).to(x.dtype), approximate="tanh"),)


def gelu_fused(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    from sftk.models.kernels.gelu_bias import gelu_bias

    return (gelu_bias(x, bias),)


def gelu_inputs(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    x, bias = draw(device, (sizes.batch, sizes.tokens, sizes.hidden), (sizes.hidden,))
    return [4 * x], [bias]


def gelu_backward_plain(grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    found = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return found, found.flatten(0, -2).sum(0, dtype=torch.float32)


def gelu_backward_fused(grad: Tensor, x: Tensor, **tile: int) -> tuple[Tensor, ...]:
    from sftk.models.kernels.gelu_bias import gelu_bias_backward

    return gelu_bias_backward(grad, x, **tile)


def gelu_backward_inputs(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    shape = (sizes.batch, sizes.tokens, sizes.hidden)
    return draw(device, shape, shape), []


CASES = {
    "norm_rope": Case(norm_rope_plain, norm_rope_fused, norm_rope_inputs, {"halves": norm_rope_halves}, fixed=2),
    "modulated_norm": Case(modulated_plain, modulated_fused, modulated_inputs),
    "residual_norm": Case(residual_plain, residual_fused, residual_inputs),
    "weighted_norm": Case(weighted_plain, weighted_fused, weighted_inputs),
    "gelu_bias": Case(gelu_plain, gelu_fused, gelu_inputs),
    "gelu_backward": Case(gelu_backward_plain, gelu_backward_fused, gelu_backward_inputs, differentiable=False),
}


def results(case: Case, form: Form, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and, of upstream gradients, the gradients of all inputs but the fixed ones."""
    if not upstream:
        return list(form(*inputs))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[: len(inputs) - case.fixed]]
    found = list(form(*leaves, *inputs[len(leaves) :]))
    return [*found, *torch.autograd.grad(found, leaves, [g.to(y.dtype) for g, y in zip(upstream, found, strict=True)])]


def place(pair: tuple[list[Tensor], list[Tensor]], half: torch.dtype, wide: torch.dtype) -> list[Tensor]:
    """Inputs in their dtypes; strides stay."""
    return [x.to(half) for x in pair[0]] + [x.to(wide) for x in pair[1]]
