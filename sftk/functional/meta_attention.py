"""Attention on meta tensors: what a fused kernel allocates and computes, without its arithmetic."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen
class SeenPairs:
    """Stands for a mask on meta tensors: how many pairs of a query and a key see each other."""

    pairs: int


@torch.library.custom_op("sftk::meta_attention", mutates_args=())
def meta_forward(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("meta_attention takes meta tensors")


@torch.library.custom_op("sftk::meta_attention_backward", mutates_args=())
def meta_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("meta_attention takes meta tensors")


@meta_forward.register_fake
def _(q, k, v, pairs):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device
    )


@meta_backward.register_fake
def _(grad, q, k, v, out, lse, pairs):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, pairs = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.pairs = pairs


def _vjp(ctx, grad, _):
    return *meta_backward(grad, *ctx.saved_tensors, ctx.pairs), None


META_OP = meta_forward._opoverload


meta_forward.register_autograd(_vjp, setup_context=_setup)


def meta_attention(q: Tensor, k: Tensor, v: Tensor, mask: SeenPairs | None) -> Tensor:
    """What a fused kernel returns for q [B, Lq, H, D] and k, v [B, Lk, H, D]: [B, Lq, H, D]; it keeps them, its output and the
    log-sum-exp [B, H, Lq] for backward.

    Example:
        >>> x = torch.empty(1, 4, 2, 8, device="meta", requires_grad=True)
        >>> meta_attention(x, x, x, None).shape
        torch.Size([1, 4, 2, 8])
    """
    pairs = q.shape[1] * k.shape[1] if mask is None else mask.pairs
    return meta_forward(q, k, v, pairs)[0]


FORWARD_OP, BACKWARD_OP = "sftk::meta_attention", "sftk::meta_attention_backward"


def attention_flops(op: str, arguments: tuple) -> int:
    """Multiplications and additions of an attention op of this file: two products forward, five backward.

    Source: FlashAttention-2, arXiv 2307.08691, section 4.1 (the backward pass recomputes the scores).

    Example:
        >>> x = torch.empty(1, 4, 2, 8, device="meta")
        >>> attention_flops(FORWARD_OP, (x, x, x, 16))
        1024
    """
    q = arguments[0]
    products = 2 if op == FORWARD_OP else 5
    return products * 2 * q.shape[0] * q.shape[2] * q.shape[3] * arguments[-1]
