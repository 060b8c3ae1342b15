"""Several linear layers that read one input."""

from __future__ import annotations

from torch import Tensor, nn

from sftk.models.held_linear import HeldLinear


def projections(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of several layers returns for one input, which those that multiply in fp8 round once between them.

    Compilers do not find this by themselves: in passes without gradient they join no operators that they do not know.

    Args:
        x: [..., in].
        layers: `nn.Linear` or what replaced one.

    Returns:
        [..., out] for each layer, to the bit what it returns when it is called alone.

    Source: row-wise scaling, arXiv 2209.05433, section 3: scales are of the input, whatever it is multiplied by.

    Example:
        >>> import torch
        >>> from sftk.models.held_linear import HalfLinear
        >>> x, layers = torch.ones(1, 16), [HalfLinear(nn.Linear(16, 32), trains_fp8=True) for _ in range(3)]
        >>> all(torch.equal(y, layer(x)) for y, layer in zip(projections(x, *layers), layers))
        True
    """
    rows, found = None, []
    for layer in layers:
        if isinstance(layer, HeldLinear) and layer.rounds_input:
            rows = layer.round_input(x) if rows is None else rows
            found.append(layer(x, rows))
        else:
            found.append(layer(x))
    return found
