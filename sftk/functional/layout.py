"""Layouts say which frame sees which: bidirectional, block-causal or teacher-forcing. Host values, hashable."""

from __future__ import annotations

import functools
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from sftk.errors import ShapeError


@attrs.frozen(kw_only=True)
class Layout:
    """Who sees whom among the frames of one forward pass.

    Args:
        kind: `block_causal`: a frame sees every frame up to the end of its own block. `teacher_forcing`: the frames come twice,
            clean then noisy; clean frames are block-causal among themselves, noisy ones see the clean frames of earlier blocks
            and their own noisy block.
        blocks: lengths of the blocks.
        window: with it, a block-causal frame sees only frames from (end of its block - window) on.
        sink: first frames that are always visible, counted in the window as a rollout counts them (`window_context`).

    Raises:
        ShapeError: the window does not hold a block and the sink, or a teacher-forcing layout has a window (it sees all clean
            frames).

    Example:
        >>> Layout(kind="block_causal", blocks=(1, 2)).frame_mask().int()
        tensor([[1, 0, 0],
                [1, 1, 1],
                [1, 1, 1]], dtype=torch.int32)
    """

    kind: Literal["block_causal", "teacher_forcing"]
    blocks: tuple[int, ...]
    window: int | None = None
    sink: int = 0

    def __attrs_post_init__(self) -> None:
        if self.window is not None and self.kind == "teacher_forcing":
            raise ShapeError(f"a teacher-forcing layout sees every clean frame before a block; found window {self.window}")
        most = max(self.blocks, default=0)
        if self.window is not None and self.window < self.sink + most:
            raise ShapeError(
                f"a window of {self.window} frames cannot hold a block of {most} and {self.sink} sink frames; make it larger"
            )

    @property
    def frames(self) -> int:
        """Frames of the pass."""
        return sum(self.blocks) * (2 if self.kind == "teacher_forcing" else 1)

    @property
    def positions(self) -> tuple[int, ...]:
        """Temporal position of each frame of the pass."""
        once = tuple(range(sum(self.blocks)))
        return once * 2 if self.kind == "teacher_forcing" else once

    def frame_mask(self, device: torch.device | str | None = None) -> Tensor:
        """[F, F] bool, [query frame, key frame], True where seen."""
        block = torch.tensor([i for i, n in enumerate(self.blocks) for _ in range(n)], device=device)
        if self.kind == "teacher_forcing":
            clean = block[:, None] >= block[None, :]
            before = block[:, None] > block[None, :]
            own = block[:, None] == block[None, :]
            return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([before, own], 1)])
        mask = block[:, None] >= block[None, :]
        if self.window is not None:
            ends = torch.tensor(self.blocks, device=device).cumsum(0)[block]
            frame = torch.arange(len(block), device=device)
            mask &= (frame[None, :] >= ends[:, None] - (self.window - self.sink)) | (frame[None, :] < self.sink)
        return mask


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def token_mask(layout: Layout, tokens_per_frame: int, device: torch.device) -> Tensor:
    """[L, L] bool over tokens, for attention that takes a dense mask.

    Example:
        >>> token_mask(Layout(kind="block_causal", blocks=(1, 1)), 2, torch.device("cpu")).int()[0]
        tensor([1, 1, 0, 0], dtype=torch.int32)
    """
    mask = layout.frame_mask(device)
    return mask.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def flex_mask(layout: Layout, tokens_per_frame: int, device: torch.device) -> Any:
    """The layout as FlexAttention's `BlockMask`, built once for each layout, size and device.

    Example:
        >>> flex_mask(Layout(kind="block_causal", blocks=(1, 1)), 128, torch.device("cpu")).shape
        (1, 1, 256, 256)
    """
    from torch.nn.attention.flex_attention import create_block_mask

    frames = layout.frame_mask(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return frames[query // tokens_per_frame, key // tokens_per_frame]

    length = layout.frames * tokens_per_frame
    return create_block_mask(sees, None, None, length, length, device=device)


def check_layout(layout: Layout | None, frames: int) -> None:
    """Checks that a layout is for this many frames.

    Raises:
        ShapeError: it is for another number.
    """
    if layout is not None and layout.frames != frames:
        raise ShapeError(f"the layout {layout} is for {layout.frames} frames, found {frames}")
