"""Classifier-free guidance in its standard form."""

from __future__ import annotations

from torch import Tensor

from sftk.core.transform import transform


def _example(batch: int, randn) -> dict:
    return {"cond": randn(batch, 3, 4, 2, 2), "uncond": randn(batch, 3, 4, 2, 2), "scale": 4.0}


@transform(out="guided", kind="per_sample", example=_example)
def guide(cond: Tensor, uncond: Tensor, *, scale: float):
    """`uncond + scale (cond - uncond)`; scale 1 is no guidance.

    The public Self-Forcing code writes `cond + w (cond - uncond)`: its w = 3 is scale = 4 here.

    Args:
        cond, uncond: predictions of the same kind (x0 or flow), any shape.

    Returns:
        guided: the same shape.

    Source: arXiv 2207.12598, eq. 6.

    Example:
        >>> import torch
        >>> guide(torch.tensor(2.0), torch.tensor(1.0), scale=4.0)
        tensor(5.)
    """
    return uncond + scale * (cond - uncond)
