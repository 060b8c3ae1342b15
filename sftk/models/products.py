"""Which operators are the products of linear layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sftk.models.fp8_training import fp8_linear_rows

Widths = Callable[[Sequence[Any]], Sequence[int]]
"""Tells, from the arguments of a product, how many features it reads and returns."""


@functools.lru_cache(maxsize=1)
def product_operators() -> Mapping[Any, Widths]:
    """The operators behind linear layers, which a backward pass computes again at the cost of a matrix product.

    Convolutions and the batched products of unfused attention are not among them: no block has the first, and the second make
    scores of all pairs of tokens.

    Returns:
        Operator to what tells the widths of a call.

    Example:
        >>> mm = torch.ops.aten.mm.default
        >>> list(product_operators()[mm]((torch.zeros(9, 2), torch.zeros(2, 4))))
        [2, 4]
    """
    aten = torch.ops.aten
    return {
        aten.mm.default: lambda args: args[1].shape,
        aten.addmm.default: lambda args: args[2].shape,
        aten._scaled_mm.default: lambda args: args[1].shape,
        fp8_linear_rows._opoverload: lambda args: args[3].shape[::-1],  # a weight as layers have it
    }


def narrows(operator: Any, args: Sequence[Any]) -> bool:
    """Whether a call of an operator is a product that returns fewer features than it reads.

    Example:
        >>> narrows(torch.ops.aten.mm.default, (torch.zeros(9, 4), torch.zeros(4, 2)))
        True
    """
    widths = product_operators().get(operator)
    if widths is None:
        return False
    read, returned = widths(args)
    return read > returned
