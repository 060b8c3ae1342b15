"""Whether a cache is of the pass that is to read it: samples, tokens of a frame, layers and heads."""

from __future__ import annotations

from torch import Tensor

from sftk.errors import ShapeError
from sftk.functional.cache import KVCache
from sftk.functional.rooms import tensors_of


def check_cache(cache: KVCache, *, batch: int, tokens: int, layers: int, heads: int, text_heads: int, head_dim: int) -> None:
    """Checks a cache against the pass that is to read it.

    Args:
        batch: samples of the pass. tokens: of one of its frames.
        layers, head_dim: of the model. heads: of its self-attention on this rank. text_heads: of its cross-attention.

    Raises:
        ShapeError: the cache is of another batch, of frames of another size, or of another model.

    Example:
        >>> import torch
        >>> from sftk.functional.cache import append
        >>> cache = append(KVCache(), ((torch.zeros(2, 12, 4, 8),) * 4,), (0, 1, 2))
        >>> check_cache(cache, batch=2, tokens=4, layers=1, heads=4, text_heads=4, head_dim=8)
        >>> check_cache(cache, batch=1, tokens=4, layers=1, heads=4, text_heads=4, head_dim=8)
        Traceback (most recent call last):
        ...
        sftk.errors.ShapeError: the cache holds keys of 2 samples, the latents are of 1; begin a new KVCache, or take_rows of it
    """
    for chunk in cache.chunks:
        first = tensors_of(chunk.layers[:1])
        length = len(chunk.positions) * tokens
        _check("keys", first, len(chunk.layers), (batch, length, heads, head_dim), layers, len(chunk.positions))
    if cache.text is not None:
        first = [k for k, _ in cache.text[:1]]
        length = first[0].shape[1] if first else 0  # a cache's text may be of any length
        _check("text keys", first, len(cache.text), (batch, length, text_heads, head_dim), layers, 1)


def _check(name: str, first: list[Tensor], count: int, expected: tuple[int, ...], layers: int, frames: int) -> None:
    """Checks the first layer's tensor, and how many layers there are."""
    of_model = "a cache serves only the model that filled it, with as many ranks to a sample"
    if count != layers:
        raise ShapeError(f"the cache holds {name} of {count} layers, the model has {layers}; {of_model}")
    found = tuple(first[0].shape)
    if found[2:] != expected[2:]:
        has, wants = (f"{heads} heads of {width} channels" for heads, width in (found[2:], expected[2:]))
        raise ShapeError(f"the cache holds {name} of {has}, the model has {wants} here; {of_model}")
    if found[0] != expected[0]:
        fix = "begin a new KVCache, or take_rows of it"
        raise ShapeError(f"the cache holds {name} of {found[0]} samples, the latents are of {expected[0]}; {fix}")
    if found[1] != expected[1]:
        has, wants = (f"{length / frames:g}" for length in (found[1], expected[1]))
        fix = "a cache serves latents of one height and width; begin others with a new KVCache"
        raise ShapeError(f"the cache holds {name} of {has} tokens a frame, the latents have {wants}; {fix}")
