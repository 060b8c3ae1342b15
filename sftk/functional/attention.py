"""Attention: one function, the backend an option."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from sftk.core.numerics import rounds_as_with_gradient
from sftk.errors import ShapeError, SpecError
from sftk.functional.apart import APART_OP
from sftk.functional.attention_spans import Spans, attention_by_spans, token_spans
from sftk.functional.flash import flash_attention, flash_operators, has_flash, has_flash_4
from sftk.functional.fp8_attention import fp8_attention
from sftk.functional.fp8_attention_training import fp8_attention_lse, fp8_training_attention
from sftk.functional.layout import Layout, flex_mask, token_mask
from sftk.functional.meta_attention import META_OP, SeenPairs, meta_attention
from sftk.functional.split_kv import split_kv_attention

Backend = Literal["auto", "sdpa", "sdpa_cudnn", "sdpa_flash", "math", "flex", "flash", "flash_split_kv"]
Kernel = Backend | Literal["fp8"]
"""What a call may ask for: a backend, or fp8 products (`fp8_attention`), which are no backend, since results differ."""
Layouts = Literal["flex", "spans"]

_KERNELS = {
    "math": SDPBackend.MATH,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
}
"""Backends that hold PyTorch to one of its kernels."""
WITHOUT_GRADIENT: Mapping[str, Backend] = {"flash_split_kv": "flash"}
"""Backends that compute calls with gradient as another one does."""
FLASH: tuple[Backend, ...] = ("flash", "flash_split_kv")
"""Backends that need the package FlashAttention."""
UNMASKED: tuple[Backend, ...] = ("sdpa_cudnn", "sdpa_flash", *FLASH)
"""Backends for CUDA in half precision that take no mask: they compute a layout as `Spans`."""


Mask = Any
"""What `attention_mask` returns: a [Lq, Lk] bool tensor, a FlexAttention `BlockMask`, `Spans`, or None."""


def attention_mask(layout: Layout | None, tokens_per_frame: int, device: torch.device, backend: Backend = "auto") -> Mask:
    """A layout in the form that a backend takes; None stays None (full attention).

    Args:
        layout: which frames see which.
        tokens_per_frame: tokens of a frame.
        device: where attention runs.
        backend: as for `attention`. `flex` takes a `BlockMask` and those in `UNMASKED` take `Spans`, which never hold all pairs
            of tokens; so does `auto` on CUDA, the first unless `set_auto` says otherwise.

    Example:
        >>> layout = Layout(kind="block_causal", blocks=(1, 1))
        >>> attention_mask(layout, 2, torch.device("cpu")).shape
        torch.Size([4, 4])
    """
    if layout is None:
        return None
    backend = "math" if _exact else backend
    if device.type == "meta" and backend != "math":
        return SeenPairs(int(layout.frame_mask().sum()) * tokens_per_frame**2)
    on_cuda = backend == "auto" and device.type == "cuda"
    if backend in UNMASKED or (on_cuda and _layouts == "spans"):
        return token_spans(layout, tokens_per_frame)
    if backend == "flex" or on_cuda:
        return flex_mask(layout, tokens_per_frame, device)
    return token_mask(layout, tokens_per_frame, device)


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, backend: Kernel = "auto") -> Tensor:
    """Softmax attention over tokens.

    Args:
        q: [B, Lq, H, D]; k, v: [B, Lk, H, D].
        mask: who sees whom, from `attention_mask`; None is full attention.
        backend: `sdpa` is PyTorch's fused attention with the kernel that it picks, `sdpa_cudnn` with cuDNN's, `sdpa_flash`
            with its FlashAttention 2; `math` its unfused one (which has second derivatives and forward mode), `flex`
            FlexAttention for masks, `flash` FlashAttention when it is installed, `flash_split_kv` its version 4 over halves of
            the keys where there is no gradient, for few queries (`split_kv_attention`). Those in `UNMASKED` need CUDA and
            half precision, and compute a layout in calls without a mask. `auto` is what suits the mask, and without one sdpa
            or what `set_auto` says. `fp8` is `fp8_attention`, and with gradient `fp8_training_attention`, without a mask.

    Returns:
        [B, Lq, H, D], q's dtype.

    Raises:
        ShapeError: axes do not fit.
        SpecError: the backend cannot do it.

    Example:
        >>> x = torch.zeros(1, 4, 2, 8)
        >>> attention(x, x, x).shape
        torch.Size([1, 4, 2, 8])
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ShapeError(f"attention takes [B, L, H, D]; found q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    backend = "math" if _exact else backend
    if isinstance(mask, Spans):
        if not _exact:
            return attention_by_spans(q, k, v, mask, functools.partial(attention, backend=backend))
        mask = token_mask(mask.layout, mask.tokens_per_frame, q.device)
    if q.is_meta and backend != "math":
        return meta_attention(q, k, v, mask)
    if backend == "fp8":
        if mask is not None:
            raise SpecError("attention in fp8 takes no mask; call another backend")
        return fp8_training_attention(q, k, v) if rounds_as_with_gradient() else fp8_attention(q, k, v)
    if mask is None:
        backend = settled(backend, q.shape[1], k.shape[1], q.device, q.dtype)
    if backend in UNMASKED and (mask is not None or not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16)):
        found = f"{q.dtype} on {q.device.type}{'' if mask is None else ' with a mask'}"
        raise SpecError(
            f"the attention backend {backend!r} needs bf16 or fp16 on CUDA without a mask, found {found}; use 'sdpa'"
        )
    if backend in FLASH:
        return flash_attention(q, k, v) if backend == "flash" else split_kv_attention(q, k, v)
    heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if mask is not None and not isinstance(mask, Tensor):
        if not _exact:
            return _flex(*heads, mask).transpose(1, 2)
        mask = _dense(mask, q.shape[1], k.shape[1], q.device)
    if backend in _KERNELS:
        with sdpa_kernel(_KERNELS[backend]):
            return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


def available_backends() -> tuple[Backend, ...]:
    """The backends that this machine has.

    Example:
        >>> "sdpa" in available_backends()
        True
    """
    everywhere: tuple[Backend, ...] = ("sdpa", "math", "flex")
    if not torch.cuda.is_available():
        return everywhere
    flash: tuple[Backend, ...] = FLASH if has_flash_4() else ("flash",) if has_flash() else ()
    return (*everywhere, "sdpa_cudnn", "sdpa_flash", *flash)


@functools.lru_cache(maxsize=1)
def attention_operators() -> frozenset[Any]:
    """The fused operators behind `attention`: what they return is worth keeping for a backward pass.

    Example:
        >>> torch.ops.aten._scaled_dot_product_flash_attention.default in attention_operators()
        True
    """
    names = ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")
    fused = (getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names)
    ours = (APART_OP, fp8_attention_lse._opoverload, META_OP)
    return frozenset((*fused, *flash_operators(), torch.ops.higher_order.flex_attention, *ours))


Fastest = Mapping[tuple[int, int], Backend]
"""Backends by the numbers of queries and keys at which they were measured."""
_SDPA: Fastest = {(1, 1): "sdpa"}
_auto: dict[str, tuple[tuple[tuple[int, int], Backend], ...]] = dict.fromkeys(("forward", "training"), tuple(_SDPA.items()))
_layouts: Layouts = "flex"


def set_auto(*, forward: Fastest = _SDPA, training: Fastest = _SDPA, layouts: Layouts = "flex") -> None:
    """Sets what `auto` takes in this process on CUDA: what `sftk bench attention` measured.

    Args:
        forward: in half precision without a mask, where gradients are off; the one measured nearest to a call's numbers of
            queries and keys, by their ratios.
        training: where they are on.
        layouts: FlexAttention's mask, or calls without a mask for each run of frames that see the same ones.

    Example:
        >>> set_auto(forward={(1000, 10): "sdpa", (1000, 1000): "sdpa_cudnn"})
        >>> automatic("forward", 800, 400)
        'sdpa_cudnn'
        >>> set_auto()
    """
    global _layouts
    _auto.update(forward=tuple(forward.items()), training=tuple(training.items()))
    _layouts = layouts


def automatic(passes: str, queries: int, keys: int) -> Backend:
    """What `auto` takes for a call's tokens, see `set_auto`.

    Args:
        passes: `forward` or `training`.

    Example:
        >>> automatic("training", 400, 400)
        'sdpa'
    """
    (nearest, found), *others = _auto[passes]
    for shape, backend in others:
        if _ratio(queries, keys, *shape) < _ratio(queries, keys, *nearest):
            nearest, found = shape, backend
    return found


def _ratio(queries: int, keys: int, other_queries: int, other_keys: int) -> float:
    """How far two shapes are from each other: the product of both ratios, each at least 1."""
    larger, smaller = max(queries, other_queries) * max(keys, other_keys), min(queries, other_queries) * min(keys, other_keys)
    return larger / smaller


def settled(backend: Backend, queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a call without a mask, once it is known what `auto` stands for.

    A model asks before its compiled blocks do: there, the number of keys may be any.

    Example:
        >>> cpu, cuda = torch.device("cpu"), torch.device("cuda")
        >>> settled("auto", 9, 9, cpu, torch.float32), settled("auto", 9, 9, cuda, torch.bfloat16)
        ('auto', 'sdpa')
    """
    if backend != "auto" or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return backend
    return automatic("training" if rounds_as_with_gradient() else "forward", queries, keys)


_exact = 0
"""How many `exact_derivatives` are open. A plain global: a recomputation in one of autograd's threads must see it, too."""


class exact_derivatives:
    """Inside, models have second derivatives and forward mode: attention is `math` whatever their backend, blocks run eagerly.

    PyTorch's fused attention, FlexAttention and FlashAttention have a first derivative only, and compiled functions no second
    one. Open it around the calls of a model whose result is differentiated twice, or around `torch.func.jvp`; a backward pass
    may run after it has closed. Attention then needs memory for all pairs of tokens. It may be entered again.

    Example:
        >>> q = torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)
        >>> with exact_derivatives():
        ...     out = attention(q, q, q, backend="flex")
        >>> (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        >>> torch.autograd.grad(grad.square().sum(), q)[0].shape
        torch.Size([1, 3, 1, 2])
    """

    def __init__(self) -> None:
        self._stances: list[Any] = []

    def __enter__(self) -> None:
        global _exact
        # Nothing to set while Dynamo traces: it reads the counter below as it goes.
        self._stances.append(nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager"))
        _exact += 1

    def __exit__(self, *error: object) -> None:
        global _exact
        _exact -= 1
        self._stances.pop().__exit__(*error)


def is_exact() -> bool:
    """Whether an `exact_derivatives` is open.

    Example:
        >>> with exact_derivatives():
        ...     is_exact()
        True
    """
    return _exact > 0


def recompute_contexts() -> tuple[Any, Any]:
    """Contexts of an activation checkpoint's forward pass and of its recomputation inside `exact_derivatives`: both exact.

    Example:
        >>> _, recompute = recompute_contexts()
        >>> with recompute:
        ...     attention_mask(Layout(kind="block_causal", blocks=(1, 1)), 1, torch.device("cpu"), "flash").shape
        torch.Size([2, 2])
    """
    return nullcontext(), exact_derivatives()


def _dense(mask: Any, queries: int, keys: int, device: torch.device) -> Tensor:
    """A `BlockMask` as a [Lq, Lk] bool tensor."""
    none = torch.zeros((), dtype=torch.long, device=device)
    q, k = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return mask.mask_mod(none, none, q[:, None], k[None, :])


def _flex(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    if not q.is_cuda:
        # FlexAttention has no backward on the CPU; its dense equivalent has.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_dense(mask, q.shape[2], k.shape[2], q.device))
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=mask)  # pyright: ignore[reportReturnType]
    return _compiled_flex()(q, k, v, block_mask=mask)


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportReturnType]
