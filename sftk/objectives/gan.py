"""Adversarial losses on logits, of generator and discriminator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sftk.core.transform import transform
from sftk.errors import ShapeError
from sftk.objectives.dmd import at_least_float32


def _logits_example(batch: int, randn) -> dict:
    return {"fake_logits": randn(batch, 1), "real_logits": randn(batch, 1), "relativistic": True}


@transform(out=("loss", "loss_weight"), kind="reduced", example=_logits_example)
def gan_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None, *, relativistic: bool = False):
    """The non-saturating loss of the generator: `softplus(-fake)`, relativistic `softplus(-(fake - real))`.

    Args:
        fake_logits: [B, K], of the student's samples.
        real_logits: [B, K], of real ones; only the relativistic loss needs them.
        relativistic: judge each sample against a real one.

    Returns:
        loss: [] float32, the sum. loss_weight: [], the number of logits.

    Raises:
        ShapeError: the relativistic loss has no real logits.

    Source: GAN, arXiv 1406.2661, section 3; relativistic, arXiv 1807.00734, eq. 4.

    Example:
        >>> gan_generator_loss(torch.zeros(2, 1))
        (tensor(1.3863), tensor(2.))
    """
    margin = at_least_float32(fake_logits)
    if relativistic:
        margin = margin - _real(real_logits)
    loss = F.softplus(-margin)
    return loss.sum(), _count(loss)


@transform(out=("loss", "loss_weight"), kind="reduced", example=_logits_example)
def gan_discriminator_loss(fake_logits: Tensor, real_logits: Tensor, *, relativistic: bool = False):
    """The loss of the discriminator: `softplus(-real) + softplus(fake)`, relativistic `softplus(-(real - fake))`.

    Args:
        fake_logits, real_logits: [B, K].
        relativistic: judge each real sample against a generated one.

    Returns:
        loss: [] float32, the sum. loss_weight: [], the number of logits of one kind.

    Source: see `gan_generator_loss`.

    Example:
        >>> gan_discriminator_loss(torch.zeros(2, 1), torch.zeros(2, 1))
        (tensor(2.7726), tensor(2.))
    """
    fake, real = at_least_float32(fake_logits), at_least_float32(real_logits)
    loss = F.softplus(fake - real) if relativistic else F.softplus(-real) + F.softplus(fake)
    return loss.sum(), _count(loss)


def _real(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise ShapeError("a relativistic loss needs the logits of real latents; bind real_logits")
    return at_least_float32(logits)


def _count(loss: Tensor) -> Tensor:
    return torch.full((), float(loss.numel()), device=loss.device, dtype=loss.dtype)
