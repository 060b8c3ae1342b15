"""Kernels that round to fp8 beside `pack`."""

from __future__ import annotations

import torch
from torch import Tensor

from sftk.functional.fp8_linear import fp8_product
from sftk.functional.fp8_rounding import fp8_rows
from sftk.functional.packed import Packed, pack


def fp8_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tokens that are rounded first."""
    return fp8_product(Packed(*fp8_rows(x)), weight, bias).unflatten(0, x.shape[:-1])


def representable(rows: int, columns: int, device: torch.device) -> Tensor:
    """Values that are codes, the largest one in every row and every column."""
    generator = torch.Generator().manual_seed(0)
    digits, powers = (torch.randint(-n, n + 1, (rows, columns), generator=generator) for n in (15, 3))
    codes = digits * 2.0**powers
    codes[:, 0], codes[0] = 448, -448
    return codes.to(device)


def check_rounding(values: Tensor, *, exact: bool) -> None:
    """Scales are those of `pack`, by rows and by columns; codes too, or where they may differ they are a nearest one."""
    from sftk.functional.kernels.fp8_rounding import round_columns, round_rows  # triton, where it is there

    for found, given in ((round_rows(values), values), (round_columns(values), values.t())):
        reference = pack(given, "fp8")
        assert found.codes.is_contiguous()
        assert found.scale.dtype == torch.float32
        # By PyTorch, CUDA multiplies by a reciprocal.
        torch.testing.assert_close(found.scale, reference.scale, rtol=2e-7, atol=0)
        if exact:
            assert torch.equal(found.codes.float(), reference.codes.float())
        check_nearest(given, found)


def check_nearest(values: Tensor, found: Packed) -> None:
    """No code is nearer to a scaled value than its own, but for float32's rounding: many bf16 values lie between two codes."""
    codes, scaled = found.codes.double(), values.double() / found.scale.double()
    spacing = 2.0 ** (scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    assert ((codes - scaled).abs() <= spacing / 2 + 1e-6 * scaled.abs()).all()
