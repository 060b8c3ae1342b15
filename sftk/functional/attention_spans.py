"""Attention under a layout without a mask: one call for each run of queries, over the keys that they see."""

from __future__ import annotations

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


def attention_by_spans(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, tokens_per_frame: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Softmax attention under a layout, as calls without a mask.

    A kernel without a mask can be faster than one with it by more than the cut into pieces costs.

    Args:
        q, k, v: [B, F * tokens_per_frame, H, D].
        layout: which frames see which.
        attend: `attend(q, k, v)`, full attention, such as `attention` of a backend.

    Returns:
        [B, F * tokens_per_frame, H, D].

    Example:
        >>> from sftk.functional.attention import attention
        >>> x = torch.randn(1, 6, 1, 4)
        >>> out = attention_by_spans(x, x, x, Layout(kind="block_causal", blocks=(1, 2)), 2, attention)
        >>> torch.allclose(out[:, :2], attention(x[:, :2], x[:, :2], x[:, :2]))
        True
    """

    def take(x: Tensor, span: Span) -> Tensor:
        return x[:, span[0] * tokens_per_frame : span[1] * tokens_per_frame]

    def seen(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
        return take(x, spans[0]) if len(spans) == 1 else torch.cat([take(x, span) for span in spans], dim=1)

    parts = [attend(take(q, own), seen(k, spans), seen(v, spans)) for own, spans in frame_spans(layout)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
