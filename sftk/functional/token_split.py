"""Splits the tokens of each frame over ranks, and turns a split by tokens into a split by heads: the part without ranks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sftk.errors import ShapeError


# A dataclass, not attrs: see `sftk.functional.cache`.
@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """Which tokens and heads of a pass a rank has.

    Every frame is cut alike, so that what is told of a frame (its timestep, who sees it) holds for a rank's part of it, and
    a cache may drop frames. Where the degree does not divide a frame's tokens, the first ranks have one more each.

    Args:
        frames: of the pass. tokens: of a frame.
        degree: how many ranks share the pass. rank: this one.

    Raises:
        ShapeError: a frame has fewer tokens than there are ranks.

    Source: attention by all-to-all over heads, DeepSpeed-Ulysses, arXiv 2309.14509, section 3.

    Example:
        >>> split = TokenSplit(frames=2, tokens=5, degree=2, rank=1)
        >>> split.sizes, split.part(torch.arange(10)[None]).tolist()
        ((3, 2), [[3, 4, 8, 9]])
    """

    frames: int
    tokens: int
    degree: int
    rank: int

    def __post_init__(self) -> None:
        if self.tokens < self.degree:
            raise ShapeError(f"a frame of {self.tokens} tokens cannot be split over {self.degree} ranks; take fewer")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of a frame on each rank."""
        each, more = divmod(self.tokens, self.degree)
        return tuple(each + (rank < more) for rank in range(self.degree))

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, F Tr, ...] of x [B, F T, ...]."""
        start = sum(self.sizes[: self.rank])
        return x.unflatten(1, (self.frames, self.tokens)).narrow(2, start, self.sizes[self.rank]).flatten(1, 2)

    def split_heads(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """What goes from tokens to heads: [B, F Tr, H, D] each, flat, an equal part for each rank."""
        by_rank = [x.unflatten(2, (self.degree, -1)).permute(2, 0, 1, 3, 4) for x in tensors]
        return torch.stack(by_rank, dim=1).flatten()

    def join_tokens(self, received: Tensor, shape: torch.Size, count: int) -> tuple[Tensor, ...]:
        """What `count` tensors of `shape` [B, F Tr, H, D] on every rank become: [B, F T, H / degree, D] each.

        Each result has memory of its own, so that keys and values in a cache keep nothing else alive.
        """
        batch, _, heads, width = shape
        each = received.numel() // self.tokens
        parts = [
            part.view(count, batch, self.frames, size, heads // self.degree, width).unbind(0)
            for part, size in zip(received.split([each * size for size in self.sizes]), self.sizes, strict=True)
        ]
        return tuple(torch.cat(same, dim=2).flatten(1, 2) for same in zip(*parts, strict=True))

    def split_tokens(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """What goes from heads to tokens: [B, F T, Hr, D] each, flat, for each rank as many tokens as it has."""
        parts = [x.unflatten(1, (self.frames, self.tokens)).split(self.sizes, dim=2) for x in tensors]
        return torch.cat([x.flatten() for of_rank in zip(*parts, strict=True) for x in of_rank])

    def join_heads(self, received: Tensor, shape: torch.Size, count: int) -> tuple[Tensor, ...]:
        """What `count` tensors of `shape` [B, F T, Hr, D] on every rank become: [B, F Tr, degree Hr, D] each."""
        batch, _, heads, width = shape
        by_rank = received.view(self.degree, count, batch, self.frames * self.sizes[self.rank], heads, width)
        return tuple(x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in by_rank.unbind(1))

    def sizes_to_heads(self, sent: int) -> tuple[list[int], list[int]]:
        """Elements that come from each rank and go to each, for `split_heads` of so many."""
        each = sent // (self.degree * self.sizes[self.rank])
        return [each * size for size in self.sizes], [sent // self.degree] * self.degree

    def sizes_to_tokens(self, sent: int) -> tuple[list[int], list[int]]:
        """Elements that come from each rank and go to each, for `split_tokens` of so many."""
        each = sent // self.tokens
        return [each * self.sizes[self.rank]] * self.degree, [each * size for size in self.sizes]


def degree_problem(degree: int, heads: int, tokens: int | None = None) -> str | None:
    """What is wrong with a degree for a model of so many heads and frames of so many tokens, or None.

    Example:
        >>> degree_problem(8, heads=12)
        'sequence 8 does not divide 12 attention heads; take one of 1, 2, 3, 4, 6, 12'
        >>> degree_problem(4, heads=12, tokens=3)
        'sequence 4 is more than the 3 tokens of a frame; take one of 1, 2, 3'
    """
    fits = ", ".join(str(n) for n in range(1, min(heads, tokens or heads) + 1) if heads % n == 0)
    if heads % degree:
        return f"sequence {degree} does not divide {heads} attention heads; take one of {fits}"
    if tokens is not None and degree > tokens:
        return f"sequence {degree} is more than the {tokens} tokens of a frame; take one of {fits}"
    return None
