"""Kernels that round to fp8 beside `pack`."""

from __future__ import annotations

import torch
from torch import Tensor

from sftk.functional.packed import pack


def representable(rows: int, columns: int, device: torch.device) -> Tensor:
    """Values that are codes, the largest one in every row and every column."""
    generator = torch.Generator().manual_seed(0)
    digits, powers = (torch.randint(-n, n + 1, (rows, columns), generator=generator) for n in (15, 3))
    codes = digits * 2.0**powers
    codes[:, 0], codes[0] = 448, -448
    return codes.to(device)


def check_rounding(values: Tensor, *, exact: bool) -> None:
    """Scales are those of `pack`, by rows and by columns; codes too, but for values between two codes to float32's rounding."""
    from sftk.functional.kernels.fp8_rounding import round_columns, round_rows  # triton, where it is there

    for found, reference in ((round_rows(values), pack(values, "fp8")), (round_columns(values), pack(values.t(), "fp8"))):
        assert found.codes.is_contiguous()
        assert found.scale.dtype == torch.float32
        # By PyTorch, CUDA multiplies by a reciprocal.
        torch.testing.assert_close(found.scale, reference.scale, rtol=2e-7, atol=0)
        one, other = found.codes.float(), reference.codes.float()
        if exact:
            assert torch.equal(one, other)
        else:
            differ = one != other
            assert differ.float().mean() < 1e-3
            assert ((one - other).abs() <= 1.01 / 8 * other.abs().clamp(min=2**-6))[differ].all()
