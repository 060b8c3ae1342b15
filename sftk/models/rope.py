"""Rotary position embedding over frames, rows and columns, with real-valued tables."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many complex pairs of a head go to time, height and width.

    Example:
        >>> axis_pairs(128)
        (22, 21, 21)
    """
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


@functools.lru_cache(maxsize=128)
@torch.inference_mode(False)  # a table that is first needed while sampling must serve training, too
def rope_table(
    positions: tuple[int, ...],
    height: int,
    width: int,
    head_dim: int,
    base_time: float,
    base: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, computed in float64.

    Args:
        positions: temporal position of each frame.
        height, width: tokens of a frame.
        head_dim: width of a head.
        base_time, base: of the frequencies `base^(-2 i / d)` of time and of space.
        dtype: of the result.

    Returns:
        cos, sin: [F * height * width, 1, head_dim / 2].

    Source: Wan 2.1, arXiv 2503.20314; RoFormer, arXiv 2104.09864, eq. 15.

    Example:
        >>> cos, _ = rope_table((0, 1), 2, 2, 12, 1e4, 1e4, torch.device("cpu"), torch.float32)
        >>> cos.shape
        torch.Size([8, 1, 6])
    """
    grid = torch.cartesian_prod(
        torch.tensor(positions, dtype=torch.float64),
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
    )
    angles = []
    for axis, (pairs, axis_base) in enumerate(zip(axis_pairs(head_dim), (base_time, base, base), strict=True)):
        frequencies = axis_base ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
        angles.append(grid[:, axis : axis + 1] * frequencies)
    angle = torch.cat(angles, dim=1)[:, None]
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs of each token by its angles.

    Args:
        x: [B, L, H, D].
        cos, sin: [L, 1, D / 2].

    Returns:
        [B, L, H, D], x's dtype; computed in the tables' dtype.

    Example:
        >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        tensor([[[[0., 1.]]]])
    """
    turn = _turn_flipped if torch.compiler.is_compiling() else _turn_halves
    return turn(x.to(cos.dtype).unflatten(-1, (-1, 2)), cos, sin).flatten(-2).to(x.dtype)


def _turn_halves(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., D / 2, 2] turned, the even channels apart from the odd ones: the fewest passes over memory without a compiler."""
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


def _turn_flipped(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same, one channel from itself and its neighbour: Inductor fuses it with a norm before and a cast after it."""
    sign = torch.arange(-1, 3, 2, dtype=cos.dtype, device=cos.device)
    return pairs * cos[..., None] + pairs.flip(-1) * sin[..., None] * sign
