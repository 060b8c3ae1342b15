"""Matrix products with both factors in fp8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sftk.functional.packed import Packed, unpack

MULTIPLE = 16
"""Widths in and out of a layer that fp8 products take are multiples of this."""


def product_bias(bias: Tensor, weight: Packed) -> Tensor:
    """A bias in the dtype in which `fp8_product` adds it: a copy, which many products may take without casting it again.

    Args:
        bias: [N]. weight: [N, K].

    Returns:
        [N], bfloat16 on a CUDA device, else of the scale's dtype.

    Example:
        >>> from sftk.functional.packed import pack
        >>> product_bias(torch.ones(3).bfloat16(), pack(torch.ones(3, 16), "fp8")).dtype
        torch.float32
    """
    return bias.detach().to(_sum_dtype(weight), copy=True)


def fp8_product(rows: Packed, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` of factors that are in fp8 already.

    On a CUDA device it is one product in fp8, summed up in float32 (from compute capability 8.9 on). Elsewhere it is a
    reference: what the codes stand for is multiplied in the scale's precision, whatever autocast says.

    Args:
        rows: [M, K]. weight: [N, K]. bias: [N], cast here unless it is `product_bias`.

    Returns:
        [M, N], bfloat16 on a CUDA device, else of the scale's dtype.

    Source: row-wise scaling, arXiv 2209.05433, section 3; PyTorch's scaled products.

    Example:
        >>> from sftk.functional.packed import pack
        >>> two, weight = pack(torch.full((1, 16), 2.0), "fp8"), pack(torch.ones(3, 16), "fp8")
        >>> fp8_product(two, weight, torch.ones(3))
        tensor([[33., 33., 33.]])
    """
    bias = None if bias is None else bias.to(_sum_dtype(weight))
    if rows.codes.device.type != "cuda":
        with torch.autocast(rows.codes.device.type, enabled=False):
            return F.linear(unpack(rows), unpack(weight), bias)
    # Fast accumulation keeps sums in the tensor cores; it is what makes fp8 faster than bf16 on Hopper.
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows.codes,
        weight.codes.t(),
        scale_a=rows.scale,
        scale_b=weight.scale.t(),  # [1, N] of one row is contiguous as it is: nothing is copied
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _sum_dtype(weight: Packed) -> torch.dtype:
    return torch.bfloat16 if weight.codes.is_cuda else weight.scale.dtype
