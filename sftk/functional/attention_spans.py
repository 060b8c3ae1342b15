"""Attention under a layout without a mask: one call for each run of queries, over the keys that they see."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sftk.functional.layout import Layout

Span = tuple[int, int]
"""First frame, and the one after the last."""


@functools.lru_cache(maxsize=64)
def frame_spans(layout: Layout) -> tuple[tuple[Span, tuple[Span, ...]], ...]:
    """Runs of frames that see the same frames, and what they see.

    Example:
        >>> frame_spans(Layout(kind="block_causal", blocks=(1, 1, 1), window=2, sink=1))
        (((0, 1), ((0, 1),)), ((1, 2), ((0, 2),)), ((2, 3), ((0, 1), (2, 3))))
    """
    rows = layout.frame_mask().tolist()
    starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
    return tuple(((start, stop), _runs(rows[start])) for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True))


def _runs(seen: list[bool]) -> tuple[Span, ...]:
    edges = [i for i in range(len(seen) + 1) if (i < len(seen) and seen[i]) != (i > 0 and seen[i - 1])]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


# A dataclass, not attrs: torch.compile can trace the construction of a frozen dataclass but not that of a frozen attrs class.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
    """A layout that is computed without a mask, see `attention_by_spans`.

    Args:
        layout: which frames see which.
        tokens_per_frame: tokens of a frame.
        runs: first token and the one after the last, of queries that see the same keys, and of those keys.
    """

    layout: Layout
    tokens_per_frame: int
    runs: tuple[tuple[Span, tuple[Span, ...]], ...]


@functools.lru_cache(maxsize=64)
def token_spans(layout: Layout, tokens_per_frame: int) -> Spans:
    """A layout as runs of tokens.

    Example:
        >>> token_spans(Layout(kind="block_causal", blocks=(1, 1)), 2).runs
        (((0, 2), ((0, 2),)), ((2, 4), ((0, 4),)))
    """

    def tokens(span: Span) -> Span:
        return span[0] * tokens_per_frame, span[1] * tokens_per_frame

    runs = tuple((tokens(own), tuple(tokens(span) for span in seen)) for own, seen in frame_spans(layout))
    return Spans(layout=layout, tokens_per_frame=tokens_per_frame, runs=runs)


def attention_by_spans(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Softmax attention under a layout, as calls without a mask.

    A kernel without a mask can be faster than one with it by more than the cut into pieces costs.

    Args:
        q, k, v: [B, F * tokens_per_frame, H, D].
        spans: which frames see which.
        attend: `attend(q, k, v)`, full attention, such as `attention` of a backend.

    Returns:
        [B, F * tokens_per_frame, H, D].

    Example:
        >>> from sftk.functional.attention import attention
        >>> x = torch.randn(1, 6, 1, 4)
        >>> spans = token_spans(Layout(kind="block_causal", blocks=(1, 2)), 2)
        >>> out = attention_by_spans(x, x, x, spans, attention)
        >>> torch.allclose(out[:, :2], attention(x[:, :2], x[:, :2], x[:, :2]))
        True
    """

    def seen(x: Tensor, keys: tuple[Span, ...]) -> Tensor:
        return x[:, slice(*keys[0])] if len(keys) == 1 else torch.cat([x[:, slice(*span)] for span in keys], dim=1)

    parts = [attend(q[:, slice(*own)], seen(k, keys), seen(v, keys)) for own, keys in spans.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
