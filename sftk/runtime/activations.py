"""Activation checkpoints: a block runs again in the backward pass, wholly or all but what costs most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sftk.functional.attention import attention_operators, is_exact, recompute_contexts
from sftk.models.products import narrows, product_operators
from sftk.spec.schema import Checkpoint

# Under compilation, PyTorch says that nothing may be changed in place between the two passes; nothing here is.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn is passed" not in record.getMessage())


def checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a block that keeps its inputs alone for the backward pass; in forward mode, which keeps none, just so.

    Source: Chen et al., arXiv 1604.06174.

    Example:
        >>> checkpointed(torch.sin, torch.zeros(1))
        tensor([0.])
    """
    return _checkpoint(block, None, args, kwargs)


def selectively_checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a block that keeps, besides its inputs, what costs much to compute for the memory it takes: the rest runs again.

    That is what attention returned, log-sum-exps among it, and what linear layers returned that narrow (the second one of a
    feed-forward layer).

    Source: selective activation recomputation, arXiv 2205.05198, section 5, the other way round: over a video's tokens
    attention costs more than all else, and its fused kernels hold no matrix of scores.

    Example:
        >>> selectively_checkpointed(torch.sin, torch.zeros(1, requires_grad=True)).requires_grad
        True
    """
    return _checkpoint(block, _keep_costly, args, kwargs)


def products_checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a block that keeps, besides its inputs, what every linear layer and attention returned: none of them runs again.

    Norms, modulation, rotation, activations and gated residuals do. So does unfused attention, whose scores of all pairs of
    tokens would take more memory than all else.

    Source: as for `selectively_checkpointed`; which operators are linear layers, `sftk.models.products` says.

    Example:
        >>> products_checkpointed(torch.sin, torch.zeros(1, requires_grad=True)).requires_grad
        True
    """
    return _checkpoint(block, _keep_products, args, kwargs)


def checkpoint_function(kind: Checkpoint) -> Callable[..., Any] | None:
    """What calls a block under a kind of checkpoint; None calls it as it is.

    Example:
        >>> checkpoint_function("full") is checkpointed
        True
    """
    return _FUNCTIONS[kind]


def _checkpoint(block: Callable[..., Any], contexts: Callable[[], Any] | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    if forward_ad._current_level >= 0:  # torch 2.11's checkpoint has no forward mode
        return block(*args, **kwargs)
    if is_exact() and not torch.compiler.is_compiling():  # no compiled block computes exactly, and nothing fused is to be kept
        contexts = recompute_contexts
    extra = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **extra, **kwargs)


def _costly(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _kept(op in attention_operators() or narrows(op, args))


def _product(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _kept(op in attention_operators() or op in product_operators())


def _kept(keep: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_costly() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_costly)


def _keep_products() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_product)


_FUNCTIONS: Mapping[Checkpoint, Callable[..., Any] | None] = {
    "none": None,
    "full": checkpointed,
    "selective": selectively_checkpointed,
    "products": products_checkpointed,
}
