"""Modules that a recipe can bind to a role by name, frozen and without checkpoints: those of the package, and codecs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from sftk.core.plugins import extensible
from sftk.data.choices import Choice
from sftk.data.codecs import Codec, make_codec
from sftk.data.digits import decode_latents
from sftk.data.digits_classifier import DigitClassifier, classify_clips, load_classifier
from sftk.errors import SpecError, did_you_mean


class DigitsReward(nn.Module):
    """How sure the digits classifier is of the wanted digit: its log-probability, the mean over frames.

    Args:
        classifier: frames to log-probabilities.

    Example:
        >>> reward = DigitsReward(load_classifier())
        >>> reward(torch.zeros(2, 3, 16, 16), torch.tensor([1, 7])).shape
        torch.Size([2])
    """

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, video: Tensor, labels: Tensor) -> Tensor:
        """[B], at most 0, from video [B, F, 16, 16] in [0, 1] and labels [B] in 0..9."""
        log_probs, _ = classify_clips(self.classifier, video)
        return log_probs.gather(1, labels[:, None])[:, 0]


class DigitsDecoder(nn.Module):
    """`decode_latents` as a module: latents of the digits task to frames in [0, 1].

    Example:
        >>> DigitsDecoder()(torch.zeros(1, 3, 4, 8, 8)).shape
        torch.Size([1, 3, 16, 16])
    """

    def forward(self, latents: Tensor) -> Tensor:
        """[B, F, 2H, 2W] from [B, F, 4, H, W]."""
        return decode_latents(latents)


class CodecModule(nn.Module):
    """A codec behind a role. Tensors on the meta device get the right shapes, and nothing is loaded.

    Args:
        codec: from `make_codec`.

    Example:
        >>> codec = CodecModule(make_codec({"use": "wan_vae", "with": {"path": "wan_models/Wan2.1-T2V-1.3B"}}))
        >>> codec.decode(torch.empty(1, 22, 16, 60, 104, device="meta")).shape
        torch.Size([1, 85, 3, 480, 832])
        >>> codec.encode(torch.empty(1, 3, 480, 832, device="meta")).shape
        torch.Size([1, 16, 60, 104])
    """

    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec

    def decode(self, latents: Tensor) -> Tensor:
        """Videos [B, F, 3, H, W] (or [B, F, H, W]) in [0, 1] of latents [B, F', C, h, w]."""
        if not latents.is_meta:
            return self.codec.decode(latents)
        batch, frames, _, height, width = latents.shape
        factor = self.codec.factor
        return latents.new_empty(batch, self.codec.pixel_frames(frames), 3, height * factor, width * factor)

    def encode(self, video: Tensor) -> Tensor:
        """Latents [F', C, h, w] of a video [F, 3, H, W] in [0, 1]."""
        if not video.is_meta:
            return self.codec.encode(video)
        frames = next(number for number in count(1) if self.codec.pixel_frames(number) >= len(video))
        height, width = (side // self.codec.factor for side in video.shape[2:])
        return video.new_empty(frames, self.codec.channels, height, width)


def _digits_classifier(device: torch.device) -> nn.Module:
    # Shapes are checked on the meta device, where there is nothing to load.
    return DigitsReward(DigitClassifier(device) if device.type == "meta" else load_classifier(device))


BUILTINS: dict[str, Callable[[torch.device], nn.Module]] = {
    "digits_classifier": _digits_classifier,
    "digits_decoder": lambda device: DigitsDecoder(),
}
"""What `models: {role: {builtin: ...}}` may name, each made for a device; a plugin may add its own."""
extensible(BUILTINS)


def builtin(name: str, device: torch.device) -> nn.Module:
    """A built-in module, frozen and in eval mode.

    Raises:
        SpecError: there is none of that name.

    Example:
        >>> builtin("digits_decoder", torch.device("cpu"))(torch.zeros(1, 3, 4, 8, 8)).shape
        torch.Size([1, 3, 16, 16])
    """
    if name not in BUILTINS:
        raise SpecError(f"unknown built-in model {name!r}; {did_you_mean(name, BUILTINS)}")
    return BUILTINS[name](device).requires_grad_(False).eval()


def ready_made(name: str | None, codec: Choice | None, device: torch.device) -> nn.Module:
    """The frozen module of a role that names a built-in one or a codec.

    Args:
        name: of a built-in module, or None.
        codec: a codec, when there is no name; its files have been found.
        device: of a built-in module; a codec's options name its own.

    Raises:
        SpecError: there is no built-in module of that name.
        DataError: the codec is unknown, or its options are wrong.

    Example:
        >>> ready_made(None, "digits", torch.device("cpu")).encode(torch.zeros(3, 3, 16, 16)).shape
        torch.Size([3, 4, 8, 8])
    """
    if name is not None:
        return builtin(name, device)
    assert codec is not None
    return CodecModule(make_codec(codec))
