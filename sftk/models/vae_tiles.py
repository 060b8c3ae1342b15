"""Pictures in overlapping tiles, for cards that cannot hold a VAE's activations of a whole one."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from sftk.errors import ShapeError


@attrs.frozen
class Tiles:
    """Squares of pixels, laid `stride` apart and blended where they overlap.

    Args:
        size: side of a tile in pixels; 0 is one tile for all. A picture that fits in one is not cut.
        stride: between the tiles' upper left corners; less than the size.

    Raises:
        ValueError: they do not fit together.

    Example:
        >>> Tiles(size=256, stride=192).overlap
        64
    """

    size: int = 0
    stride: int = 0

    def __attrs_post_init__(self) -> None:
        if self.size and not 0 < self.stride <= self.size:
            raise ValueError(f"tiles of {self.size} pixels need a stride in 1..{self.size}, found {self.stride}")

    @property
    def overlap(self) -> int:
        """Pixels that neighbours share."""
        return self.size - self.stride

    def cuts(self, height: int, width: int) -> bool:
        """Whether a picture of so many pixels is cut."""
        return self.size > 0 and max(height, width) > self.size


WHOLE = Tiles()
"""No tiles."""


def split_tiles(latents: Tensor, tiles: Tiles, factor: int) -> list[list[Tensor]]:
    """Rows of tiles [..., h', w'] of latents [..., h, w].

    Args:
        factor: pixels of a latent's row or column.

    Raises:
        ShapeError: the factor does not divide the tiles' size or stride.

    Example:
        >>> [[list(tile.shape) for tile in row] for row in split_tiles(torch.zeros(3, 5), Tiles(size=24, stride=16), 8)]
        [[[3, 3], [3, 3], [3, 1]], [[1, 3], [1, 3], [1, 1]]]
    """
    height, width = latents.shape[-2:]
    if not tiles.cuts(height * factor, width * factor):
        return [[latents]]
    if tiles.size % factor or tiles.stride % factor:
        raise ShapeError(f"{tiles} does not fit a VAE whose latents stand for {factor} pixels; take multiples of {factor}")
    size, stride = tiles.size // factor, tiles.stride // factor
    return [
        [latents[..., top : top + size, left : left + size] for left in range(0, width, stride)]
        for top in range(0, height, stride)
    ]


def join_tiles(rows: Sequence[Sequence[Tensor]], tiles: Tiles, patch: int, size: Sequence[int], factor: int) -> Tensor:
    """The decoded picture of decoded tiles, blended linearly where they overlap.

    Args:
        rows: of tiles [..., H', W'], in units of `patch` pixels.
        size: rows and columns of the whole latents.
        factor: pixels of a latent's row or column.

    Example:
        >>> left, right = torch.zeros(1, 4), torch.ones(1, 4)
        >>> join_tiles([[left, right, right[:, :2]]], Tiles(size=4, stride=2), 1, (1, 6), 1)
        tensor([[0.0000, 0.0000, 0.0000, 0.5000, 1.0000, 1.0000]])
    """
    if len(rows) == 1 and len(rows[0]) == 1:
        return rows[0][0]
    stride, overlap = tiles.stride // patch, tiles.overlap // patch
    blended: list[list[Tensor]] = []
    for row in rows:
        done: list[Tensor] = []
        for column, tile in enumerate(row):
            if blended:
                tile = _blend(blended[-1][column], tile, overlap, -2)
            if done:
                tile = _blend(done[-1], tile, overlap, -1)
            done.append(tile)
        blended.append(done)
    pictures = [torch.cat([tile[..., :stride, :stride] for tile in row], dim=-1) for row in blended]
    height, width = (side * factor // patch for side in size)
    return torch.cat(pictures, dim=-2)[..., :height, :width]


def _blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """`after`, whose first rows or columns fade in over the last ones of `before`."""
    overlap = min(overlap, before.shape[dim], after.shape[dim])
    if overlap == 0:
        return after
    share = torch.arange(overlap, device=after.device, dtype=after.dtype) / overlap
    share = share[:, None] if dim == -2 else share
    kept = before.narrow(dim, before.shape[dim] - overlap, overlap)
    mixed = kept * (1 - share) + after.narrow(dim, 0, overlap) * share
    return torch.cat([mixed, after.narrow(dim, overlap, after.shape[dim] - overlap)], dim=dim)
