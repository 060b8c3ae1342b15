"""What the ranks that share a pass's tokens ask of one another; a pass on one rank asks nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """How ranks that hold parts of every frame's tokens trade them in one pass; `F` frames of `T` tokens, here `Tr` of them.

    A rank has all heads of its tokens, or all tokens of its heads. What is called whole is the same on every rank.
    """

    @property
    def degree(self) -> int:
        """How many ranks share the pass; each has that share of the heads."""
        ...

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, F Tr, C] of x [B, F T, C], which is whole; the gradient that goes back is whole, too."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """All tokens [B, F T, C] of x [B, F Tr, C]. Of a whole gradient, the same on every rank, it takes this rank's."""
        ...

    def shared(self, x: Tensor) -> Tensor:
        """x itself, a whole tensor that every rank uses for its own tokens: what the ranks send back is summed."""
        ...

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of this rank's heads, [B, F T, Hr, D] each, from all heads of its tokens, [B, F Tr, H, D]."""
        ...

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back of `to_heads`: [B, F Tr, H, D] from [B, F T, Hr, D]."""
        ...


class OneRank:
    """The `Exchange` of a pass that one rank makes alone.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 4, 2, 8)
        >>> OneRank().to_tokens(x) is x
        True
    """

    degree = 1

    def part(self, x: Tensor) -> Tensor:
        return x

    def whole(self, x: Tensor) -> Tensor:
        return x

    def shared(self, x: Tensor) -> Tensor:
        return x

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def to_tokens(self, x: Tensor) -> Tensor:
        return x


ExchangeFor = Callable[[int, int], Exchange]
"""Gives the exchange of a pass over so many frames of so many tokens."""


_ONE_RANK = OneRank()


def one_rank(frames: int, tokens: int) -> Exchange:
    """The `ExchangeFor` of models that are not split.

    Example:
        >>> type(one_rank(3, 16)).__name__
        'OneRank'
    """
    return _ONE_RANK
