"""Rounding of matrices to fp8: by rows, by columns, and by rows behind an activation."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sftk.functional.packed import DTYPES, Packed, pack


@functools.cache
def _kernels() -> Any:
    """The Triton kernels that round, or None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from sftk.functional.kernels import fp8_rounding

    return fp8_rounding


def by_rows(values: Tensor, *, gelu: bool = False) -> Packed:
    """Rounds to fp8 with a scale for each row: on CUDA by one kernel, elsewhere (and without Triton) by `pack`.

    Args:
        values: [M, K], floating-point.
        gelu: round `gelu(values)`, in its tanh form.

    Returns:
        Codes [M, K]; scales [M, 1], float32 on CUDA, float32 at least elsewhere.

    Source: row-wise scaling, arXiv 2209.05433, section 3.

    Example:
        >>> by_rows(torch.tensor([[896.0, 2.0]])).scale
        tensor([[2.]])
    """
    if values.is_cuda and (kernels := _kernels()) is not None:
        return kernels.round_rows(values, gelu=gelu)
    return _packed(F.gelu(values, approximate="tanh") if gelu else values)


def by_columns(values: Tensor) -> Packed:
    """Rounds the transpose to fp8, with a scale for each column of the values; see `by_rows`.

    Args:
        values: [N, K], floating-point.

    Returns:
        Codes [K, N], contiguous; scales [K, 1].

    Source: row-wise scaling, arXiv 2209.05433, section 3.

    Example:
        >>> by_columns(torch.tensor([[896.0, 448.0]])).scale
        tensor([[2.],
                [1.]])
    """
    if values.is_cuda and (kernels := _kernels()) is not None:
        return kernels.round_columns(values)
    return _packed(values.t().contiguous())


def _packed(values: Tensor) -> Packed:
    rows = pack(values, "fp8")
    return Packed(rows.codes, rows.scale.to(_scales(values)))


def _scales(values: Tensor) -> torch.dtype:
    """float32, as products on a GPU take it; the reference computes float64 in float64."""
    return torch.float32 if values.is_cuda else torch.promote_types(values.dtype, torch.float32)


@torch.library.custom_op("sftk::fp8_rows", mutates_args=())
def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds tokens to fp8. An operator apart from the product, so that several layers may take what one call rounded.

    Args:
        x: [..., K], floating-point.

    Returns:
        codes: [M, K] float8_e4m3fn, M tokens. scale: [M, 1] float32; on a CPU x's dtype if that is wider.

    Source: row-wise scaling, arXiv 2209.05433, section 3.

    Example:
        >>> codes, scale = fp8_rows(torch.tensor([[896.0, 2.0]]))
        >>> codes.float(), scale
        (tensor([[448., 1.]]), tensor([[2.]]))
    """
    rows = by_rows(x.flatten(0, -2))
    return rows.codes, rows.scale


@fp8_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.flatten(0, -2)
    return flat.new_empty(flat.shape, dtype=DTYPES["fp8"]), flat.new_empty((flat.shape[0], 1), dtype=_scales(x))


@torch.library.custom_op("sftk::fp8_gelu_rows", mutates_args=())
def fp8_gelu_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8_rows(gelu(x))`, GELU in its tanh form, with nothing written in between; without gradient.

    Args:
        x: [..., K], floating-point.

    Returns:
        As `fp8_rows`.

    Source: GELU, arXiv 1606.08415, section 2; row-wise scaling, arXiv 2209.05433, section 3.

    Example:
        >>> codes, scale = fp8_gelu_rows(torch.tensor([[100.0, -100.0]]))
        >>> (codes.float() * scale).round()
        tensor([[100.,   0.]])
    """
    rows = by_rows(x.flatten(0, -2), gelu=True)
    return rows.codes, rows.scale


@fp8_gelu_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.flatten(0, -2)
    return flat.new_empty(flat.shape, dtype=DTYPES["fp8"]), flat.new_empty((flat.shape[0], 1), dtype=_scales(x))
