"""Modules that ship with the package and that a recipe can bind to a role by name: frozen, without checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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


def _digits_classifier(device: torch.device) -> nn.Module:
    # Shapes are checked on the meta device, where there is nothing to load.
    return DigitsReward(DigitClassifier(device) if device.type == "meta" else load_classifier(device))


BUILTINS: dict[str, Callable[[torch.device], nn.Module]] = {
    "digits_classifier": _digits_classifier,
    "digits_decoder": lambda device: DigitsDecoder(),
}
"""What `models: {role: {builtin: ...}}` may name, each made for a device; a plugin may add its own."""


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
