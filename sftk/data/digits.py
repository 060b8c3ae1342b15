"""The embedded task: handwritten digits that move over a torus. `digits_prompts` says which digit goes where.

A clip shows one 8 x 8 digit on a 16 x 16 canvas whose edges are joined; it moves one pixel a frame to the left, to the
right, up or down. Images and licence: `sftk/assets/digits/NOTICE.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import torch
from torch import Tensor

from sftk.data.digits_prompts import DIRECTIONS, PROMPT_SHAPE, embed_prompts, parse_prompt, prompt_table, prompt_text
from sftk.errors import DataError, ShapeError, did_you_mean

__all__ = [
    "ASSETS", "CANVAS", "DIRECTIONS", "LATENT_MEAN", "LATENT_STD", "PROMPT_SHAPE", "STEPS", "DigitClips", "Digits", "Split",
    "collate", "decode_latents", "embed_prompts", "encode_latents", "load_digits", "parse_prompt", "prompt_text",
    "render_clips",
]  # fmt: skip

Split = Literal["train", "test"]

ASSETS = Path(__file__).parents[1] / "assets" / "digits"
CANVAS = 16
STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))
"""Rows and columns that a digit moves in one frame, by direction."""
LATENT_MEAN, LATENT_STD = -0.75, 0.5
"""Of pixels in [-1, 1]."""


@attrs.frozen(kw_only=True, eq=False)
class Digits:
    """Still digits: `images` [N, 8, 8] float32 in [0, 1] and their `labels` [N] int64 in 0..9."""

    images: Tensor
    labels: Tensor


def load_digits(split: Split) -> Digits:
    """The shipped digits of one split. Every sixth image of each class is in `test` (296 images), the others in `train`.

    Args:
        split: "train" or "test".

    Raises:
        DataError: no such split, or the shipped file is missing.

    Example:
        >>> digits = load_digits("test")
        >>> digits.images.shape, digits.labels[:4].tolist()
        (torch.Size([296, 8, 8]), [5, 9, 0, 7])
    """
    images, labels, held_out = _packed()
    if split not in ("train", "test"):
        raise DataError(f"no split {split!r} of the digits; {did_you_mean(str(split), ('train', 'test'))}")
    chosen = held_out if split == "test" else ~held_out
    pixels = torch.from_numpy(images[chosen].astype(np.float32)) / 16.0
    return Digits(images=pixels, labels=torch.from_numpy(labels[chosen].astype(np.int64)))


def render_clips(images: Tensor, directions: Tensor, starts: Tensor, frames: int, first_frame: int = 0) -> Tensor:
    """Clips of moving digits, by index arithmetic only.

    Args:
        images: [B, 8, 8], floating point; pixels in [0, 1].
        directions: [B], integers into `DIRECTIONS`.
        starts: [B, 2], integers; row and column of the digit's upper left corner at frame 0, modulo 16.
        frames: how many frames to draw, at least 1.
        first_frame: the frame to draw first; any integer.

    Returns:
        [B, F, 16, 16], dtype and device of `images`.

    Raises:
        ShapeError: axes differ from the above.

    Example:
        >>> image = torch.zeros(1, 8, 8)
        >>> image[0, 0, 0] = 1.0
        >>> video = render_clips(image, torch.tensor([0]), torch.tensor([[5, 1]]), frames=3)
        >>> video.nonzero().tolist()
        [[0, 0, 5, 1], [0, 1, 5, 0], [0, 2, 5, 15]]
    """
    batch = images.shape[0] if images.ndim else 0
    if images.ndim != 3 or images.shape[1] > CANVAS or images.shape[2] > CANVAS:
        raise ShapeError(f"images has shape {tuple(images.shape)}; expected [B, 8, 8]")
    if directions.shape != (batch,) or starts.shape != (batch, 2):
        found = f"directions {tuple(directions.shape)} and starts {tuple(starts.shape)}"
        raise ShapeError(f"found {found}; expected [{batch}] and [{batch}, 2], one for each of {batch} images")
    if frames < 1:
        raise ShapeError(f"frames is {frames}; expected at least 1")
    device = images.device
    canvas = images.new_zeros(batch, CANVAS, CANVAS)
    canvas[:, : images.shape[1], : images.shape[2]] = images
    steps = torch.tensor(STEPS, device=device)[directions]
    times = torch.arange(first_frame, first_frame + frames, device=device)
    corners = starts[:, None] + times[None, :, None] * steps[:, None]
    sources = (torch.arange(CANVAS, device=device)[:, None] - corners[:, :, None]) % CANVAS
    offsets = torch.arange(batch, device=device)[:, None, None] * CANVAS
    rows = (offsets + sources[..., 0]) * CANVAS
    return canvas.flatten()[rows[..., :, None] + sources[..., None, :, 1]]


def encode_latents(video: Tensor) -> Tensor:
    """Pixels to latents: 2 x 2 blocks become channels (row by row), and pixels are standardised with fixed numbers.

    Args:
        video: [B, F, H, W], in [0, 1], with even H and W.

    Returns:
        [B, F, 4, H/2, W/2]; a black pixel is -0.5, a white one 3.5.

    Raises:
        ShapeError: not four axes, or an odd height or width.

    Example:
        >>> encode_latents(torch.tensor([[[[0.0, 1.0], [0.5, 0.25]]]])).flatten().tolist()
        [-0.5, 3.5, 1.5, 0.5]
    """
    if video.ndim != 4 or video.shape[2] % 2 or video.shape[3] % 2:
        raise ShapeError(f"video has shape {tuple(video.shape)}; expected [B, F, H, W] with even H and W")
    batch, frames, height, width = video.shape
    blocks = video.reshape(batch, frames, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    pixels = blocks.reshape(batch, frames, 4, height // 2, width // 2)
    return pixels * (2.0 / LATENT_STD) - (1.0 + LATENT_MEAN) / LATENT_STD


def decode_latents(latents: Tensor) -> Tensor:
    """Latents to pixels: the inverse of `encode_latents`, clamped to [0, 1].

    Args:
        latents: [B, F, 4, H/2, W/2].

    Returns:
        [B, F, H, W], in [0, 1].

    Raises:
        ShapeError: not five axes, or not four channels.

    Example:
        >>> video = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(decode_latents(encode_latents(video)), video)
        True
    """
    if latents.ndim != 5 or latents.shape[2] != 4:
        raise ShapeError(f"latents has shape {tuple(latents.shape)}; expected [B, F, 4, H/2, W/2]")
    batch, frames, _, height, width = latents.shape
    pixels = latents * (LATENT_STD / 2.0) + (1.0 + LATENT_MEAN) / 2.0
    blocks = pixels.reshape(batch, frames, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(batch, frames, 2 * height, 2 * width).clamp(0.0, 1.0)


@attrs.frozen(eq=False)
class DigitClips:
    """A map-style dataset of moving digits. Sample i is a function of (seed, split, i) alone.

    Image, direction and start are drawn by a counter-based hash, so order, batch size and workers do not matter.
    `__getitem__` gives one sample; `__getitems__`, which torch's `DataLoader` calls, draws a whole batch at once and returns
    it collated. `collate` accepts both; pass it as `collate_fn`.

    Args:
        split: which images, "train" or "test".
        frames: frames of a clip.
        seed: any integer.
        size: how many samples the dataset has.

    Keys of a sample (of a batch: with a leading axis B, and `prompt` a list):
        latents [F, 4, 8, 8] float32; prompt_embeds, negative_embeds [4, 32] float32; prompt str; digit, direction int.

    Raises:
        DataError: no such split, or `frames` or `size` below 1.

    Example:
        >>> clips = DigitClips("train", frames=21, seed=0)
        >>> clips[5]["latents"].shape, clips[5]["prompt"]
        (torch.Size([21, 4, 8, 8]), 'a ... moving ...')
        >>> torch.equal(clips[5]["latents"], clips.__getitems__([9, 5])["latents"][1])
        True
    """

    split: Split = "train"
    frames: int = 21
    seed: int = 0
    size: int = 65536
    digits: Digits = attrs.field(init=False, repr=False, default=attrs.Factory(lambda self: load_digits(self.split), True))

    def __attrs_post_init__(self) -> None:
        if self.frames < 1 or self.size < 1:
            raise DataError(f"frames is {self.frames} and size is {self.size}; expected at least 1 of each")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        items = {key: value[0] for key, value in batch.items()}
        return items | {key: int(items[key]) for key in ("digit", "direction")}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """The samples at B `indices` as one batch. Raises: IndexError for an index outside 0..size - 1."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.size):
            raise IndexError(f"index outside 0..{self.size - 1}: {indices}")
        key = _mix(_mix(np.array([self.seed & (2**64 - 1)], dtype=np.uint64)) + np.uint64(self.split == "test"))
        keys = _mix(key + wanted.astype(np.uint64))
        image, direction, row, column = (
            torch.from_numpy(((_mix(keys + np.uint64(stream)) >> np.uint64(11)) % np.uint64(count)).astype(np.int64))
            for stream, count in enumerate((len(self.digits.labels), len(DIRECTIONS), CANVAS, CANVAS))
        )
        video = render_clips(self.digits.images[image], direction, torch.stack((row, column), 1), self.frames)
        digit = self.digits.labels[image]
        return {
            "latents": encode_latents(video),
            "prompt_embeds": prompt_table()[digit, direction],
            "negative_embeds": torch.zeros(len(wanted), *PROMPT_SHAPE),
            "prompt": [prompt_text(*pair) for pair in zip(digit.tolist(), direction.tolist(), strict=True)],
            "digit": digit,
            "direction": direction,
        }


def collate(items: Sequence[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """Samples as one batch: tensors stacked, integers as int64 [B], strings listed. A batch passes through.

    Example:
        >>> clips = DigitClips("test", frames=3)
        >>> batch = collate([clips[0], clips[1]])
        >>> batch["latents"].shape, batch["digit"].dtype, len(batch["prompt"]), collate(batch) is batch
        (torch.Size([2, 3, 4, 8, 8]), torch.int64, 2, True)
    """
    if isinstance(items, dict):
        return items
    columns = {key: [item[key] for item in items] for key in items[0]}
    texts = {key: values for key, values in columns.items() if isinstance(values[0], str)}
    stacked = {key: torch.stack([torch.as_tensor(v) for v in values]) for key, values in columns.items() if key not in texts}
    return stacked | texts


@functools.cache
def _packed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The packed images and labels, and which of them are held out."""
    path = ASSETS / "digits.npz"
    try:
        with np.load(path) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"cannot read the shipped digits in {path}: {error}; install sftk again") from error
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[5::6]] = True
    return images, labels, held_out


def _mix(counter: np.ndarray) -> np.ndarray:
    """One output of splitmix64 for each uint64 counter (Steele, Lea and Flood 2014)."""
    z = counter * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
