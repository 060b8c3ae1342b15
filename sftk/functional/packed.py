"""Tensors in a byte for each value: codes in 8 bits and a scale for each row."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Storage = Literal["full", "fp8", "int8"]
"""How values are kept: as they are, as float8_e4m3fn or as int8."""
Coded = Literal["fp8", "int8"]

DTYPES: dict[str, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST: dict[str, float] = {"fp8": torch.finfo(torch.float8_e4m3fn).max, "int8": torch.iinfo(torch.int8).max}
"""The code that a row's largest value gets."""
SMALLEST_SCALE = 1e-30
"""Of a row of zeros, so that nothing is divided by zero."""


# A named tuple: PyTorch's trees, hooks and compiler know what is in it.
class Packed(NamedTuple):
    """Stands for `codes * scale`.

    Args:
        codes: [..., N], float8 or int8. scale: [..., 1], float32 at least.
        path: zeros [..., N] through which gradient flows, or None.
    """

    codes: Tensor
    scale: Tensor
    path: Tensor | None = None


def pack(values: Tensor, storage: Coded) -> Packed:
    """Values with 8 bits each, scaled so that the largest of a row (of a token and head, say) is the largest code.

    In int8 the error is at most 1/254 of a row's largest value; in fp8 1/16 of a value, or 2^-10 of the scale if that is more.
    Gradient goes through as if nothing were rounded.

    Args:
        values: [..., N], floating-point.

    Source: absolute-maximum scaling as in LLM.int8(), arXiv 2208.07339, eq. 3, of rows; FP8's formats, arXiv 2209.05433.

    Example:
        >>> packed = pack(torch.tensor([[127.0, -63.6, 0.0]]), "int8")
        >>> packed.codes.tolist(), packed.scale.tolist()
        ([[127, -64, 0]], [[1.0]])
    """
    exact = values.detach()
    wide = exact.to(torch.promote_types(exact.dtype, torch.float32))
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST[storage]).clamp(min=SMALLEST_SCALE)
    codes = wide / scale
    codes = (codes.round() if storage == "int8" else codes).to(DTYPES[storage])
    return Packed(codes, scale, values - exact if values.requires_grad else None)


def unpack(values: Tensor | Packed, dtype: torch.dtype | None = None) -> Tensor:
    """What packed values stand for; a tensor is itself.

    Args:
        dtype: of the result; None takes that of the scale, or the tensor's own.

    Example:
        >>> unpack(pack(torch.tensor([1.0, 0.3]), "fp8"))
        tensor([1.0000, 0.2857])
    """
    if isinstance(values, Tensor):
        return values if dtype is None else values.to(dtype)
    found = values.codes.to(values.scale.dtype) * values.scale
    found = found if dtype is None else found.to(dtype)
    return found if values.path is None else found + values.path.to(found.dtype)
