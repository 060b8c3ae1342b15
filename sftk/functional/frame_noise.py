"""The noise of a video of any length, drawn frame by frame when it is taken."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from sftk.errors import ShapeError
from sftk.functional.keys import Key


@attrs.frozen(eq=False)
class FrameNoise:
    """Stands for the noise [B, F, C, H, W] of a rollout: nodes read its shape and cut frames out of it.

    Each frame has numbers of its own. So a video's beginning depends neither on its length nor on the blocks in which it is
    made, on any device, and a long video holds no more noise than a short one.

    Args:
        key: where the numbers come from.
        frame_shape: C, H, W.
        frames: F.
        device: where they are drawn.

    Example:
        >>> short, long = (FrameNoise(Key(seed=0, samples=(4, 7)), (4, 2, 2), frames) for frames in (3, 10**9))
        >>> short.shape, torch.equal(short[:, 0:3], long[:, 0:3])
        (torch.Size([2, 3, 4, 2, 2]), True)
    """

    key: Key
    frame_shape: tuple[int, int, int]
    frames: int
    device: torch.device | str = "cpu"

    @property
    def shape(self) -> torch.Size:
        """[B, F, C, H, W]."""
        return torch.Size((len(self.key.samples), self.frames, *self.frame_shape))

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """`noise[:, start:stop]`, drawn anew each time.

        Raises:
            ShapeError: something else than a range of frames of all samples.
        """
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], slice)):
            raise ShapeError(f"frames of noise are taken as noise[:, start:stop], found {index}")
        places = range(*index[1].indices(self.frames))
        drawn = [self.key.normal(f"noise_f{place}", self.frame_shape, device=self.device) for place in places]
        return torch.stack(drawn, dim=1)

    def whole(self) -> Tensor:
        """All of it.

        Example:
            >>> FrameNoise(Key(seed=0), (4, 2, 2), 3).whole().shape
            torch.Size([1, 3, 4, 2, 2])
        """
        return self[:, 0 : self.frames]
