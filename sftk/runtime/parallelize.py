"""What is done to a model from outside, in one place and one order: activation checkpointing, then per-block compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from sftk.functional.attention import recompute_contexts

RECOMPILE_LIMIT = 64
"""Graphs of one block over a rollout: context lengths times gradient modes, with room."""


def parallelize(model: nn.Module, *, checkpoint: str = "none", compile_blocks: bool = False) -> nn.Module:
    """Wraps the model's `blocks` in place and returns it.

    Args:
        model: a backbone has `blocks`, a `ModuleList`; a module without any is left as it is.
        checkpoint: `full` recomputes each block in the backward pass instead of keeping its activations.
        compile_blocks: compile each block with `torch.compile`.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> model = parallelize(WanModel(preset("digits")), checkpoint="full")
        >>> sorted(model.state_dict())[0]
        'blocks.0.cross_attn.k.bias'
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        return model
    for index, block in enumerate(blocks):
        if checkpoint == "full":
            block = checkpoint_wrapper(block, checkpoint_fn=checkpointed)
            blocks[index] = block
        if compile_blocks:
            block.compile()
    if compile_blocks:
        limit_recompiles()
    return model


def checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a block under activation checkpointing; in forward mode, which keeps no activations, just so.

    Example:
        >>> checkpointed(torch.sin, torch.zeros(1))
        tensor([0.])
    """
    if forward_ad._current_level >= 0:  # torch 2.11's checkpoint has no forward mode
        return block(*args, **kwargs)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=recompute_contexts, **kwargs)


def limit_recompiles() -> None:
    """Makes reaching the recompile limit an error instead of a silent fall back to eager."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
