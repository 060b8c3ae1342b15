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
        ShapeError: the relativistic loss has no real logits, or not one for each fake one.

    Source: GAN, arXiv 1406.2661, section 3; relativistic, arXiv 1807.00734, eq. 4, as in R3GAN, arXiv 2501.05441.

    Example:
        >>> gan_generator_loss(torch.zeros(2, 1))
        (tensor(1.3863), tensor(2.))
    """
    margin = at_least_float32(fake_logits)
    if relativistic:
        if real_logits is None:
            raise ShapeError("a relativistic loss needs the logits of real latents; bind real_logits")
        _check_pairs(fake_logits, real_logits)
        margin = margin - at_least_float32(real_logits)
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

    Raises:
        ShapeError: there is not one real logit for each fake one.

    Source: see `gan_generator_loss`.

    Example:
        >>> gan_discriminator_loss(torch.zeros(2, 1), torch.zeros(2, 1))
        (tensor(2.7726), tensor(2.))
    """
    _check_pairs(fake_logits, real_logits)
    fake, real = at_least_float32(fake_logits), at_least_float32(real_logits)
    loss = F.softplus(fake - real) if relativistic else F.softplus(-real) + F.softplus(fake)
    return loss.sum(), _count(loss)


def _check_pairs(fake_logits: Tensor, real_logits: Tensor) -> None:
    if fake_logits.shape != real_logits.shape:
        fake, real = list(fake_logits.shape), list(real_logits.shape)
        raise ShapeError(f"fake and real logits are compared one to one; found {fake} and {real}; take as many real samples")


def _count(loss: Tensor) -> Tensor:
    return torch.full((), float(loss.numel()), device=loss.device, dtype=loss.dtype)
