"""Named codecs: how pictures become latents and latents pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from sftk.core.plugins import extensible
from sftk.data.choices import Choice, make_choice
from sftk.data.digits import LATENT_MEAN, LATENT_STD
from sftk.data.wan import WanVaeCodec
from sftk.errors import DataError, ShapeError


class Codec(Protocol):
    """Pictures to latents and back. Everything is float32 on the CPU or wherever the input lies.

    `factor`: pixels of a latent's row or column. `pixel_frames(n)`: pictures that n latent frames stand for. `channels`: of the
    latents. `encode`: [F, 3, H, W] in [0, 1] to [F', C, H / factor, W / factor]. `decode`: latents [B, F', C, h, w] to
    [B, F, H, W] or [B, F, 3, H, W] in [0, 1]. `decode_block`: the same of a video's next latents, given the state that the
    block before returned (None at first), and the state for the next; blocks of any lengths give the frames of `decode`.
    `prepare`: loads what it needs, so that what is missing is known early.
    """

    @property
    def factor(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def pixel_frames(self, latent_frames: int) -> int: ...

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def decode_block(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]: ...

    def prepare(self) -> None: ...


@attrs.frozen(kw_only=True)
class PixelUnshuffle:
    """Blocks of pixels become channels, and pixels in [-1, 1] are standardised; lossless, one latent frame a picture.

    Args:
        factor: rows and columns of a block.
        mean, std: of the pixels.
        grey: the mean of red, green and blue instead of all three.

    Raises:
        ValueError: factor below 1 or std not positive.

    Example:
        >>> codec = PixelUnshuffle(factor=2, mean=0.0, std=0.5)
        >>> video = torch.rand(4, 3, 16, 24)
        >>> codec.encode(video).shape
        torch.Size([4, 12, 8, 12])
        >>> torch.allclose(codec.decode(codec.encode(video)[None])[0], video, atol=1e-6)
        True
    """

    factor: int = 2
    mean: float = 0.0
    std: float = 1.0
    grey: bool = False

    def __attrs_post_init__(self) -> None:
        if self.factor < 1 or self.std <= 0:
            raise ValueError(f"factor must be at least 1 and std above 0, found {self.factor} and {self.std}")

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.factor**2 * (1 if self.grey else 3)

    def pixel_frames(self, latent_frames: int) -> int:
        """One picture for each latent frame."""
        return latent_frames

    def encode(self, video: Tensor) -> Tensor:
        """[F, 3, H, W] in [0, 1] to [F, C, H / factor, W / factor].

        Raises:
            ShapeError: other axes, or the factor does not divide a side.
        """
        if video.dim() != 4 or video.shape[1] != 3 or video.shape[2] % self.factor or video.shape[3] % self.factor:
            found = list(video.shape)
            raise ShapeError(f"video has shape {found}; expected [F, 3, H, W] with sides that {self.factor} divides")
        pixels = video.mean(1, keepdim=True) if self.grey else video
        return (torch.nn.functional.pixel_unshuffle(pixels, self.factor) * 2 - 1 - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to [0, 1], with a batch axis.

        Raises:
            ShapeError: not five axes, or another number of channels.
        """
        if latents.dim() != 5 or latents.shape[2] != self.channels:
            raise ShapeError(f"latents have shape {list(latents.shape)}; expected [B, F, {self.channels}, h, w]")
        pixels = torch.nn.functional.pixel_shuffle((latents * self.std + self.mean + 1) / 2, self.factor).clamp(0, 1)
        return pixels[:, :, 0] if self.grey else pixels

    def decode_block(self, latents: Tensor, state: None) -> tuple[Tensor, None]:
        """As `decode`: no frame needs another."""
        return self.decode(latents), None

    def prepare(self) -> None:
        """There is nothing to load."""


def digits_codec() -> PixelUnshuffle:
    """The latents of the embedded task.

    Example:
        >>> digits_codec().channels
        4
    """
    return PixelUnshuffle(factor=2, mean=LATENT_MEAN, std=LATENT_STD, grey=True)


CODECS: dict[str, Callable[..., Codec]] = {
    "pixel_unshuffle": PixelUnshuffle,
    "digits": digits_codec,
    "wan_vae": WanVaeCodec,
}
"""Makers of codecs by name, called with the options of `{use: ..., with: ...}`; a plugin may add its own."""
extensible(CODECS)


def make_codec(codec: Choice) -> Codec:
    """The codec that an option names.

    Raises:
        DataError: it is unknown, or its options are wrong.

    Example:
        >>> make_codec({"use": "pixel_unshuffle", "with": {"factor": 4}}).channels
        48
    """
    return make_choice("codec", CODECS, codec)


def check_codec(codec: Codec, channels: int, where: str) -> None:
    """Checks that a codec makes latents of so many channels.

    Raises:
        DataError: it does not.
    """
    if codec.channels != channels:
        raise DataError(
            f"{where}: the codec makes {codec.channels} channels, the recipe's latents have {channels}; "
            f"set latents.channels: {codec.channels}, or name another codec"
        )
