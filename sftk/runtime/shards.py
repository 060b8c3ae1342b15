"""A parameter may be a DTensor, of which this rank holds some rows: its part, its place in the whole, the whole."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank, without a copy: changing it changes the tensor.

    Example:
        >>> import torch
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. For a sharded one a collective, which every rank must join.

    Example:
        >>> import torch
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows(tensor: Tensor) -> slice | None:
    """Which rows (places along the first axis) of the whole lie on this rank; None is all of them, as of any plain tensor.

    Example:
        >>> import torch
        >>> rows(torch.ones(2)) is None
        True
    """
    if not isinstance(tensor, DTensor):
        return None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape[1:]) == tuple(tensor.shape[1:]), "weights are sharded by rows"
    return slice(offset[0], offset[0] + shape[0]) if shape else None
