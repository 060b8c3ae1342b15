"""Sizes of latents and tokens, computed from a config and nowhere written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from sftk.errors import ShapeError


@attrs.frozen(kw_only=True)
class LatentShape:
    """Size of one sample's latents: frames, channels, height and width in latent pixels.

    Example:
        >>> LatentShape(frames=21, channels=16, height=60, width=104).tokens_per_frame((1, 2, 2))
        1560
    """

    frames: int
    channels: int
    height: int
    width: int

    def tensor_shape(self, batch: int) -> tuple[int, int, int, int, int]:
        """[B, F, C, H, W]."""
        return batch, self.frames, self.channels, self.height, self.width

    def tokens_per_frame(self, patch: tuple[int, int, int]) -> int:
        """Tokens that a transformer with this patch size makes of one latent frame.

        Raises:
            ShapeError: the patch does not divide the frame.
        """
        if self.height % patch[1] or self.width % patch[2]:
            raise ShapeError(f"a patch of {patch[1]}x{patch[2]} does not divide latents of {self.height}x{self.width}")
        return (self.height // patch[1]) * (self.width // patch[2])


def split_blocks(frames: int, frames_per_block: int, independent_first_frame: bool = False) -> tuple[int, ...]:
    """Lengths of the blocks in which a rollout makes `frames` latent frames.

    Args:
        frames: how many frames there are.
        frames_per_block: frames in a block.
        independent_first_frame: the first block is one frame long.

    Raises:
        ShapeError: the frames do not divide into blocks.

    Example:
        >>> split_blocks(7, 3, independent_first_frame=True)
        (1, 3, 3)
    """
    if frames_per_block < 1:
        raise ShapeError(f"a block has at least 1 frame, found {frames_per_block}")
    head = (1,) if independent_first_frame else ()
    rest = frames - len(head)
    if frames < 1 or rest % frames_per_block:
        first = " after a first frame of its own" if independent_first_frame else ""
        below = len(head) + rest // frames_per_block * frames_per_block
        fits = " or ".join(str(n) for n in (below, below + frames_per_block) if n > 0)
        raise ShapeError(f"{frames} frames do not divide into blocks of {frames_per_block}{first}; take {fits} frames")
    return (*head, *(frames_per_block,) * (rest // frames_per_block))


def block_problems(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    """Checks the options that cut frames into blocks, for `@transform(check=)`.

    `frames_per_block` and `independent_first_frame` must divide the frames, unless an option `per` says that something else
    than blocks is meant; `window` and `sink` of a pass must leave room for a block, and need blocks at all.

    Example:
        >>> [name for name, _ in block_problems({"frames_per_block": 4}, 21)]
        ['frames_per_block']
        >>> list(block_problems({"frames_per_block": 4, "per": "frame"}, 21))
        []
    """
    per_block = options.get("frames_per_block")
    if options.get("per", "block") != "block":
        return
    if per_block is None:
        for name in ("independent_first_frame", "window", "sink"):
            if options.get(name):
                yield name, f"a pass over all frames at once has no blocks, found {name} {options[name]}; set frames_per_block"
    elif per_block < 1:
        yield "frames_per_block", f"a block has at least 1 frame, found {per_block}"
    elif frames is not None:
        try:
            split_blocks(frames, per_block, options.get("independent_first_frame", False))
        except ShapeError as error:
            yield "frames_per_block", str(error)
    window, sink = options.get("window"), options.get("sink", 0)
    if per_block is not None and window is not None and window < per_block + sink:
        yield "window", f"a window of {window} frames cannot hold a block of {per_block} and {sink} sink frames; make it larger"
