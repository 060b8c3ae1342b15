"""Attention with both products in fp8, for passes without gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sftk.functional.packed import pack, unpack

TILE = 128
"""Keys, and values, that share a scale in each head."""
LEAST_DIM = 32
"""Channels of a head at least, in powers of two."""


@torch.library.custom_op("sftk::fp8_attention", mutates_args=())
def fp8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention whose queries, keys, values and probabilities are rounded to fp8 (e4m3); without gradient.

    Each query has a scale of its own in each head; keys and values share one over a tile of `TILE` tokens of a head, and
    probabilities are relative to the largest so far, times 2^8. Sums over tiles are float32, those within a tile the tensor
    cores' (14 bits on Hopper). With normal random numbers the output is about 5% off, most of it from rounding queries and
    keys; a trained model's attention is less even, see benchmarks/lowp.py.

    On a CUDA device (compute capability 8.9 or above, with triton) a kernel computes it, on Hopper one with specialised warps.
    Elsewhere it is a reference, in which probabilities are not rounded.

    Args:
        q: [B, Lq, H, D], D a power of two from 32 on. k, v: [B, Lk, H, D].

    Returns:
        [B, Lq, H, D], q's dtype.

    Source: FlashAttention-3, arXiv 2407.08608, section 3.3, block quantization; SageAttention, arXiv 2410.02367, section 4.

    Example:
        >>> q, k, v = torch.randn(3, 1, 256, 2, 32).unbind()
        >>> exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        >>> found = fp8_attention(q, k, v)
        >>> 0.001 < float((found - exact).norm() / exact.norm()) < 0.1
        True
    """
    if q.is_cuda:
        from sftk.functional.kernels.fp8_attention import attend  # triton, where it is used

        return attend(q, k, v)
    heads = [x.transpose(1, 2) for x in rounded_factors(q, k, v)]
    return F.scaled_dot_product_attention(heads[0], heads[1], heads[2]).transpose(1, 2).contiguous()


@fp8_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def rounded_factors(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the codes of `fp8_attention` stand for.

    Args:
        q: [B, Lq, H, D]. k, v: [B, Lk, H, D].

    Returns:
        q, k, v in their shapes and dtypes, rounded.

    Source: as for `fp8_attention`.

    Example:
        >>> x = torch.full((1, 2, 1, 32), 3.0)
        >>> [torch.equal(found, x) for found in rounded_factors(x, x, x)]
        [True, True, True]
    """
    return unpack(pack(q, "fp8"), q.dtype), _by_tiles(k), _by_tiles(v)


def _by_tiles(x: Tensor) -> Tensor:
    """[B, L, H, D], rounded with a scale for each tile of tokens in each head."""
    tokens, dim = x.shape[1], x.shape[3]
    padded = F.pad(x, (0, 0, 0, 0, 0, -tokens % TILE)).unflatten(1, (-1, TILE)).transpose(2, 3)
    tiles = pack(padded.flatten(3), "fp8")
    return unpack(tiles, x.dtype).unflatten(3, (TILE, dim)).transpose(2, 3).flatten(1, 2)[:, :tokens]
