"""Pictures of any size as pictures of one size."""

from __future__ import annotations

import torch
from torch import Tensor


def cover(video: Tensor, height: int, width: int) -> Tensor:
    """Pictures scaled until they cover a size, and cut to it at the centre.

    Args:
        video: [F, C, H, W] in [0, 1].
        height, width: in pixels.

    Returns:
        [F, C, height, width] in [0, 1].

    Example:
        >>> cover(torch.rand(2, 3, 20, 50), 8, 8).shape
        torch.Size([2, 3, 8, 8])
    """
    rows, columns = video.shape[2:]
    scale = max(height / rows, width / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    if size != (rows, columns):
        video = torch.nn.functional.interpolate(video, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width].clamp(0, 1)
