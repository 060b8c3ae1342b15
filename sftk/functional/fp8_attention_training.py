"""Attention in fp8 for passes with gradient: its forward pass in fp8, its gradients as FlashAttention computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sftk.errors import SpecError
from sftk.functional.flash import flash_backward, has_flash_4
from sftk.functional.fp8_attention import rounded_factors


@torch.library.custom_op("sftk::fp8_attention_lse", mutates_args=())
def fp8_attention_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8_attention` and the log-sum-exp of its scores; its gradients are those of attention in the dtype of q.

    A backward pass takes queries, keys and values as they are, and output and log-sum-exp as they were found in fp8: it is
    FlashAttention's, whose products are half of a step's attention and would lose more than they gain in fp8.

    Args:
        q: [B, Lq, H, D], D a power of two from 32 on. k, v: [B, Lk, H, D].

    Returns:
        out: [B, Lq, H, D], q's dtype. lse: [B, H, Lq], float32, on a CPU q's dtype if that is wider; without gradient.

    Source: FlashAttention-2, arXiv 2307.08691, algorithm 2, for the gradients; see `fp8_attention`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 256, 2, 32, requires_grad=True)
        >>> out, lse = fp8_attention_lse(q, k, v)
        >>> [x.shape == q.shape for x in torch.autograd.grad(out.sum(), (q, k, v))], lse.shape
        ([True, True, True], torch.Size([1, 2, 256]))
    """
    if q.is_cuda:
        from sftk.functional.kernels.fp8_attention import attend_lse  # triton, where it is used

        return attend_lse(q, k, v)
    heads = (x.transpose(1, 2) for x in rounded_factors(q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@fp8_attention_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    dtype = torch.float32 if q.is_cuda else torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    *given, lse = ctx.saved_tensors
    if grad.is_cuda:
        return flash_backward(grad, *given, lse)
    heads = (x.transpose(1, 2) for x in (grad, *given))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, lse, 0.0, False)
    return tuple(x.transpose(1, 2) for x in found)


fp8_attention_lse.register_autograd(_gradients, setup_context=_remember)


def fp8_training_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output of `fp8_attention_lse`.

    Raises:
        SpecError: on a CUDA device without FlashAttention 4, which computes the gradients.

    Example:
        >>> x = torch.randn(1, 128, 1, 32)
        >>> torch.allclose(fp8_training_attention(x, x, x), x, atol=10)
        True
    """
    if q.is_cuda and not has_flash_4():
        raise SpecError(
            "attention in fp8 with gradient needs FlashAttention 4, which computes the gradients: pip install 'sftk[flash]'; "
            "or set lowp.training or lowp.attention to full"
        )
    return fp8_attention_lse(q, k, v)[0]
