"""Matrix products with both factors in fp8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sftk.functional.packed import Packed, unpack

MULTIPLE = 16
"""Widths in and out of a layer that fp8 products take are multiples of this."""


def fp8_product(rows: Packed, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` of factors that are in fp8 already.

    On a CUDA device it is one product in fp8, summed up in float32 (from compute capability 8.9 on). Elsewhere it is a
    reference: what the codes stand for is multiplied in the scale's precision, whatever autocast says.

    Args:
        rows: [M, K]. weight: [N, K]. bias: [N].

    Returns:
        [M, N], bfloat16 on a CUDA device, else of the scale's dtype.

    Source: row-wise scaling, arXiv 2209.05433, section 3; PyTorch's scaled products.

    Example:
        >>> from sftk.functional.packed import pack
        >>> two, weight = pack(torch.full((1, 16), 2.0), "fp8"), pack(torch.ones(3, 16), "fp8")
        >>> fp8_product(two, weight, torch.ones(3))
        tensor([[33., 33., 33.]])
    """
    if rows.codes.device.type != "cuda":
        with torch.autocast(rows.codes.device.type, enabled=False):
            return F.linear(unpack(rows), unpack(weight), None if bias is None else bias.to(weight.scale.dtype))
    # Fast accumulation keeps sums in the tensor cores; it is what makes fp8 faster than bf16 on Hopper.
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows.codes,
        weight.codes.t(),
        scale_a=rows.scale,
        scale_b=weight.scale.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
