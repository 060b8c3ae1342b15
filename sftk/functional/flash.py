"""FlashAttention, whichever version is installed; version 4 behind operators of ours, which compile and checkpoints know."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sftk.errors import SpecError

MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""FlashAttention 4, 3 and 2."""


@torch.library.custom_op("sftk::flash", mutates_args=(), device_types="cuda")
def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention 4: softmax attention over all keys, and the log-sum-exp of the scores.

    Args:
        q: [B, Lq, H, D] bf16 or fp16 on CUDA; k, v: [B, Lk, H, D].

    Returns:
        out: [B, Lq, H, D], contiguous. lse: [B, H, Lq] float32.

    Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.

    Example:
        >>> flash._opoverload.name()
        'sftk::flash'
    """
    out, lse, *_ = _interface()._flash_attn_fwd(q, k, v, return_lse=True)
    return out, lse


@flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


@torch.library.custom_op("sftk::flash_backward", mutates_args=(), device_types="cuda")
def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `flash` for its queries, keys and values.

    Args:
        grad: [B, Lq, H, D], of `out`. The others: what `flash` took and returned.

    Returns:
        Gradients in the shapes of q, k and v, contiguous.

    Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.

    Example:
        >>> flash_backward._opoverload.name()
        'sftk::flash_backward'
    """
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _interface()._flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@flash_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    """Of the output alone: nothing here differentiates the log-sum-exp."""
    return flash_backward(grad, *ctx.saved_tensors)


flash.register_autograd(_gradients, setup_context=_remember)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the FlashAttention that is installed.

    Args:
        q: [B, Lq, H, D] bf16 or fp16 on CUDA; k, v: [B, Lk, H, D].

    Raises:
        SpecError: there is none.

    Example:
        >>> if not has_flash():
        ...     try:
        ...         flash_attention(*torch.zeros(3, 1, 2, 1, 8))
        ...     except SpecError as error:
        ...         print(str(error).partition(";")[0])
        the attention backend 'flash' needs FlashAttention: pip install 'sftk[flash]'
    """
    if has_flash_4():
        return flash(q, k, v)[0]
    installed = _installed()
    if installed is None:
        raise SpecError(f"the attention backend 'flash' needs FlashAttention: pip install 'sftk[flash]'; tried {_reasons()}")
    out = _functions[installed](q, k, v)
    return out[0] if isinstance(out, tuple) else out


def has_flash() -> bool:
    """Whether a FlashAttention can be imported.

    Example:
        >>> isinstance(has_flash(), bool)
        True
    """
    return _installed() is not None


def has_flash_4() -> bool:
    """Whether the FlashAttention that is used is version 4.

    Example:
        >>> has_flash() or not has_flash_4()
        True
    """
    return _installed() == MODULES[0]


def flash_operators() -> tuple[Any, ...]:
    """The operators of FlashAttention whose results are worth keeping for a backward pass.

    Example:
        >>> flash._opoverload in flash_operators()
        True
    """
    names = (("flash_attn", "_flash_attn_forward"), ("flash_attn_3", "fwd"), ("flash_attn_3", "_flash_attn_forward"))
    return (flash._opoverload, *(op.default for name in names if (op := _operator(*name)) is not None))


def _operator(namespace: str, name: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name, None)


_functions: dict[str, Callable[..., Any]] = {}
_missing: dict[str, str] = {}


@torch.compiler.assume_constant_result  # Dynamo would trace imports, and lose the whole block to them
def _installed() -> str | None:
    """The first of `MODULES` that can be imported; its function is in `_functions` from then on."""
    for module in MODULES:
        if module not in _functions and module not in _missing:
            try:
                _functions[module] = _quietly(module).flash_attn_func
            except (ImportError, AttributeError) as error:
                _missing[module] = str(error)
        if module in _functions:
            return module
    return None


def _reasons() -> str:
    return "; ".join(f"{module}: {reason}" for module, reason in _missing.items())


@functools.lru_cache(maxsize=1)
def _interface() -> Any:
    """Where version 4 keeps its two passes."""
    # Said by its compiler of its own arguments, when a kernel is compiled.
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted", category=UserWarning)
    return _quietly("flash_attn.cute.interface")


def _quietly(module: str) -> Any:
    """The module; what these packages say about the ones that they import is not for our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(module)
