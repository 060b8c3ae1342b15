"""Activation checkpoints: a block runs again in the backward pass, wholly or all but its attention."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sftk.functional.attention import attention_operators, is_exact, recompute_contexts

Checkpoint = Literal["none", "full", "selective"]

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


def checkpoint_function(kind: Checkpoint) -> Callable[..., Any] | None:
    """What calls a block under a kind of checkpoint; None calls it as it is.

    Example:
        >>> checkpoint_function("full") is checkpointed
        True
    """
    return {"none": None, "full": checkpointed, "selective": selectively_checkpointed}[kind]


def _checkpoint(block: Callable[..., Any], contexts: Callable[[], Any] | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    if forward_ad._current_level >= 0:  # torch 2.11's checkpoint has no forward mode
        return block(*args, **kwargs)
    if is_exact() and not torch.compiler.is_compiling():  # no compiled block computes exactly, and nothing fused is to be kept
        contexts = recompute_contexts
    extra = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **extra, **kwargs)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in attention_operators() or (op in _LINEAR and args[-1].shape[0] > args[-1].shape[1])
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_LINEAR = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _keep_costly() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)
