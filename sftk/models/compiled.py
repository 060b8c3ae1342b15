"""What a model tells the compiler about the calls of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sftk.functional.rooms import CachedKV


def is_compiled(block: nn.Module) -> bool:
    """Whether `block.compile()` was called.

    Example:
        >>> block = nn.Linear(1, 1)
        >>> before = is_compiled(block)
        >>> block.compile(backend="eager")
        >>> before, is_compiled(block)
        (False, True)
    """
    return getattr(block, "_compiled_call_impl", None) is not None


def any_length(past: Sequence[CachedKV]) -> None:
    """Says of cached keys and values that one graph is to serve any number of tokens.

    Args:
        past: k, v of each chunk, [B, tokens, H, D], or packed ones.

    Example:
        >>> any_length([(torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8))])
    """
    for values in (values for chunk in past for values in chunk):
        for tensor in (values,) if isinstance(values, Tensor) else values:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
