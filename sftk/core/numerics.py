"""Whether a call is to round as calls with gradient do: without one, models may take shorter ways, which round otherwise."""

from __future__ import annotations

import torch


class as_with_gradient:
    """Inside, calls without gradient compute what they would with it, to the bit: they will be made again with gradient.

    Example:
        >>> with torch.no_grad(), as_with_gradient():
        ...     torch.is_grad_enabled(), rounds_as_with_gradient()
        (False, True)
    """

    def __enter__(self) -> None:
        global _open
        _open += 1

    def __exit__(self, *error: object) -> None:
        global _open
        _open -= 1


_open = 0


def rounds_as_with_gradient() -> bool:
    """Whether gradients are on, or an `as_with_gradient` is open.

    Example:
        >>> with torch.no_grad():
        ...     rounds_as_with_gradient()
        False
    """
    return torch.is_grad_enabled() or _open > 0
