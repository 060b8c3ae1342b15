"""How far attention and its gradients are from exact ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sftk.runtime.attention_shapes import Shape

CHUNK = 512
"""Queries of one step of the reference: it holds their scores with all keys in float32."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def reference(
    q: Tensor, k: Tensor, v: Tensor, cotangent: Tensor, shape: Shape, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention and its gradients in float32 (or float64), some queries at a time.

    Args:
        q: [B, Lq, H, D]; k, v: [B, Lk, H, D]. cotangent: [B, Lq, H, D], of the output.

    Returns:
        Output and gradients of q, k and v.

    Example:
        >>> inputs = (torch.ones(1, tokens, 2, 8) for tokens in (4, 6, 6, 4))
        >>> [x.shape[1] for x in reference(*inputs, Shape(name="cross", queries=4, keys=6))]
        [4, 4, 6, 6]
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, cotangent = (x.detach().to(wide) for x in (q, k, v, cotangent))
    k, v = k.requires_grad_(), v.requires_grad_()
    seen = None if shape.layout is None else shape.layout.frame_mask(q.device)
    frame = torch.arange(k.shape[1], device=q.device) // shape.tokens_per_frame
    outs, grads = [], []
    for start in range(0, q.shape[1], chunk):
        part = q[:, start : start + chunk].clone().requires_grad_()
        scores = torch.einsum("bqhd,bkhd->bhqk", part, k) / q.shape[-1] ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[frame[start : start + chunk]][:, frame], float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        out.backward(cotangent[:, start : start + chunk])
        outs.append(out.detach())
        grads.append(part.grad)
    assert k.grad is not None and v.grad is not None
    return torch.cat(outs, 1), torch.cat(grads, 1), k.grad, v.grad


def relative_errors(attend: Attend, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors of the output, the larger of that with and that without gradient, and of the gradients.

    Args:
        attend: q, k, v to the output.
        inputs: q, k, v and the output's cotangent. expected: see `reference`.

    Returns:
        `out`, `q`, `k` and `v` to their errors.

    Example:
        >>> inputs = tuple(torch.ones(4, 1, 4, 2, 8).unbind())
        >>> expected = reference(*inputs, Shape(name="full", queries=4, keys=4))
        >>> relative_errors(lambda q, k, v: v + 0 * (q + k), inputs, expected)["out"]
        0.0
    """
    *given, cotangent = inputs
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = attend(*leaves)
    found = (out, *torch.autograd.grad(out, leaves, cotangent))
    errors = {name: relative_error(x, exact) for name, x, exact in zip(("out", "q", "k", "v"), found, expected, strict=True)}
    with torch.no_grad():
        without = relative_error(attend(*leaves), expected[0])
    return errors | {"out": max(errors["out"], without)}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact.

    Example:
        >>> relative_error(torch.tensor([1.5]), torch.tensor([1.0]))
        0.5
    """
    return float((found.detach().to(exact.dtype) - exact).norm() / exact.norm())
