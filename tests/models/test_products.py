"""The operators that linear layers come down to are known, with their widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sftk.functional.packed import pack
from sftk.models.products import narrows, product_operators

READ, RETURNED = 32, 48


class Products(TorchDispatchMode):
    """Widths of the products that were computed."""

    def __init__(self):
        super().__init__()
        self.widths, self.narrow = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in product_operators():
            self.widths.append(tuple(product_operators()[func](args)))
            self.narrow.append(narrows(func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, READ), (2, 3, 5, READ), (7, READ), (5, READ, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(shape, bias, cast):
    """That are trained, of tokens of any shape, contiguous or not, in autocast's precision or their own."""
    x = torch.randn(shape)
    x = x if shape[-1] == READ else x.mT
    with Products() as found, torch.autocast("cpu", torch.bfloat16, enabled=cast):
        F.linear(x, torch.randn(RETURNED, READ, requires_grad=True), torch.randn(RETURNED) if bias else None)
        F.linear(x, torch.randn(READ // 2, READ, requires_grad=True), None)
    assert found.widths == [(READ, RETURNED), (READ, READ // 2)]
    assert found.narrow == [False, True]


def test_products_in_fp8():
    rows, weight = pack(torch.randn(16, READ), "fp8"), pack(torch.randn(RETURNED, READ), "fp8")
    with Products() as found, torch.device("meta"):
        parts = [torch.empty_like(t, device="meta") for t in (rows.codes, weight.codes, rows.scale, weight.scale)]
        torch._scaled_mm(
            parts[0], parts[1].t(), scale_a=parts[2].float(), scale_b=parts[3].float().t(), out_dtype=torch.bfloat16
        )
    assert found.widths == [(READ, RETURNED)]


def test_products_between_activations_are_not_of_a_layer():
    scores = torch.randn(2, 3, 5, 8)
    with Products() as found:
        torch.matmul(scores, scores.mT)
        F.conv1d(torch.randn(1, 4, 8), torch.randn(6, 4, 3))
    assert found.widths == []
    assert not narrows(torch.ops.aten.bmm.default, (scores, scores))
