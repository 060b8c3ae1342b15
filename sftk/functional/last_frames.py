"""The frames of a long rollout that are judged: its last ones, begun by a picture as every clip of the data is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from sftk.core.geometry import block_problems, split_blocks
from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.functional.plan import split_given


class PictureCodec(Protocol):
    """The codec port: pictures to latents and back, without gradient.

    `decode`: latents [B, F, C, h, w] to videos [B, F', 3, H, W] (or [B, F', H, W]) in [0, 1], from the start of a video.
    `encode`: one video [F', 3, H, W] in [0, 1] to its latents [F, C, h, w]; a single picture is one latent frame.
    """

    def decode(self, latents: Tensor) -> Tensor: ...

    def encode(self, video: Tensor) -> Tensor: ...


class ToyCodec:
    """A codec of a few additions, for examples and laws: latent frames stand for two pictures each, the first for one."""

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 2 F - 1, 3, H, W] from [B, F, C, H, W]."""
        grey = latents.mean(dim=2, keepdim=True).sigmoid().expand(-1, -1, 3, -1, -1)
        return grey.repeat_interleave(2, dim=1)[:, 1:]

    def encode(self, video: Tensor) -> Tensor:
        """[F, 4, H, W] from [2 F - 1, 3, H, W]."""
        return video[::2].mean(dim=1, keepdim=True).expand(-1, 4, -1, -1)


def last_picture(codec: PictureCodec, latents: Tensor) -> Tensor:
    """The last picture of videos as a latent frame of its own, as it would be if a video began there.

    Args:
        codec: decodes the whole videos and encodes the one picture of each.
        latents: [B, F, C, H, W], from the start of the videos.

    Returns:
        [B, 1, C, H, W] in the dtype and on the device of `latents`, without gradient.

    Example:
        >>> last_picture(ToyCodec(), torch.zeros(2, 5, 4, 2, 2)).shape
        torch.Size([2, 1, 4, 2, 2])
    """
    with torch.no_grad():
        picture = codec.decode(latents.detach())[:, -1:]
        if picture.dim() == 4:
            picture = picture[:, :, None].expand(-1, -1, 3, -1, -1)
        return torch.stack([codec.encode(one) for one in picture]).to(latents)


def _example(batch: int, randn) -> dict:
    mask = torch.ones(batch, 9, dtype=torch.bool)
    return {"codec": ToyCodec(), "x0": randn(batch, 9, 4, 2, 2), "gradient_mask": mask, "frames": 6}


def _check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    yield from block_problems(options, frames)
    if options["frames"] < 2:
        yield "frames", f"a picture and at least one frame after it are judged, found {options['frames']}"


@transform(
    out=("judged", "judged_mask"),
    kind="per_sample",
    models=("codec",),
    example=_example,
    check=_check,
)
def last_frames_with_image(
    codec: PictureCodec,
    x0: Tensor,
    gradient_mask: Tensor,
    initial_latents: Tensor | None = None,
    *,
    frames: int = 21,
    frames_per_block: int = 3,
    independent_first_frame: bool = False,
):
    """The last frames of a rollout as a clip of its own: its first frame is the last picture before the others, encoded anew.

    A causal video codec gives the first latent frame of a clip one picture and each other one several, so that a window cut out
    of a longer video is no clip that a score model knows. The frame before the window is decoded with all that comes before
    it, and its last picture becomes the window's first latent frame. The block that holds this frame carries no gradient.

    Args:
        codec: see `PictureCodec`.
        x0: [B, N, C, H, W], the whole rollout, given frames first.
        gradient_mask: [B, N] bool, frames that carry gradient.
        initial_latents: [B, F0, C, H, W], the given frames at its start; only their number is used.
        frames: how many are judged. A rollout that is no longer is returned as it is.
        frames_per_block, independent_first_frame: of the rollout.

    Returns:
        judged: [B, frames, C, H, W]: the picture, and the last `frames - 1` of `x0`, detached where `judged_mask` is False.
        judged_mask: [B, frames] bool.

    Raises:
        ShapeError: `x0` and `gradient_mask` have other numbers of frames, the frames do not divide into blocks, or the codec
            makes another shape of a picture.

    Source: training on more than 21 frames in Self-Forcing (arXiv 2506.08009), public implementation.

    Example:
        >>> x0, mask = torch.zeros(1, 9, 4, 2, 2), torch.ones(1, 9, dtype=torch.bool)
        >>> judged, judged_mask = last_frames_with_image(ToyCodec(), x0, mask, frames=6)
        >>> judged.shape, judged_mask.tolist()
        (torch.Size([1, 6, 4, 2, 2]), [[False, False, False, True, True, True]])
    """
    total = x0.shape[1]
    if gradient_mask.shape[:2] != x0.shape[:2]:
        found = f"{list(gradient_mask.shape)} for x0 of {list(x0.shape)}"
        raise ShapeError(f"gradient_mask has shape {found}; expected one entry for each frame (leave `output_frames` null)")
    if total <= frames:
        return x0, gradient_mask
    first = total - frames
    fixed = _block_end(first, total, initial_latents, frames_per_block, independent_first_frame) - first
    picture = last_picture(codec, x0[:, : first + 1])
    if picture.shape[2:] != x0.shape[2:] or picture.shape[1] != 1:
        found, wanted = list(picture.shape[1:]), [1, *x0.shape[2:]]
        raise ShapeError(f"the codec makes latents of {found} of one picture, the rollout has frames of {wanted}")
    judged = torch.cat([picture, x0[:, first + 1 : first + fixed].detach(), x0[:, first + fixed :]], dim=1)
    free = torch.arange(frames, device=x0.device) >= fixed
    return judged, gradient_mask[:, first:] & free


def _block_end(frame: int, total: int, initial_latents: Tensor | None, per_block: int, independent: bool) -> int:
    """The first frame after the block that holds a frame."""
    given = 0 if initial_latents is None else initial_latents.shape[1]
    lengths = (*split_given(given, per_block, independent), *split_blocks(total - given, per_block, independent and not given))
    return next(end for end in accumulate(lengths) if end > frame)


def _first_check(options: Mapping[str, Any], frames: int | None) -> Iterator[tuple[str, str]]:
    if options["frames"] < 1:
        yield "frames", f"at least 1 frame is kept, found {options['frames']}"


@transform(
    out="first",
    kind="per_sample",
    example=lambda batch, randn: {"latents": randn(batch, 9, 4, 2, 2), "frames": 6},
    check=_first_check,
)
def first_frames(latents: Tensor, *, frames: int):
    """The first frames of clips: what of real ones stands beside the window of a long rollout, which begins as they do.

    Args:
        latents: [B, F, C, H, W].
        frames: how many are kept; shorter clips are returned as they are.

    Returns:
        first: [B, min(F, frames), C, H, W].

    Example:
        >>> first_frames(torch.zeros(1, 9, 4, 2, 2), frames=6).shape
        torch.Size([1, 6, 4, 2, 2])
    """
    return latents[:, :frames]
