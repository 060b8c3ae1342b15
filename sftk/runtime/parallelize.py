"""What is done to a model from outside, in one place and one order: activation checkpoint, per-block compilation, sharding."""

from __future__ import annotations

import warnings

import attrs
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from sftk.runtime.activations import Checkpoint, checkpoint_function

RECOMPILE_LIMIT = 64
"""Graphs of one block over a rollout: context lengths times gradient modes, with room."""


@attrs.frozen(kw_only=True, eq=False)
class Sharding:
    """How FSDP2 shards one model.

    Args:
        mesh: `("replicate", "shard")`, or `("shard",)`, see `sftk.runtime.mesh`.
        reshard: free gathered blocks after their forward pass.
        offload: keep the shards in the host's memory.
        gather: dtype in which weights are gathered and computed with; None takes their own. Gradients are reduced in float32
            at least.
    """

    mesh: DeviceMesh
    reshard: bool = True
    offload: bool = False
    gather: torch.dtype | None = None


def parallelize(
    model: nn.Module, *, checkpoint: Checkpoint = "none", compile_blocks: bool = False, sharding: Sharding | None = None
) -> nn.Module:
    """Wraps the model's `blocks`, and shards it, in place and returns it.

    Args:
        model: a backbone has `blocks`, a `ModuleList`; of a module without any only the whole is sharded. It may be on the
            meta device.
        checkpoint: `full` recomputes each block in the backward pass instead of keeping its activations, `selective` all of
            it but attention and linear layers that narrow, `products` all of it but attention and linear layers.
        compile_blocks: compile each block with `torch.compile`.
        sharding: None leaves the weights whole.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> model = parallelize(WanModel(preset("digits")), checkpoint="full")
        >>> sorted(model.state_dict())[0]
        'blocks.0.cross_attn.k.bias'
    """
    blocks = getattr(model, "blocks", None)
    blocks = blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList()
    through = checkpoint_function(checkpoint)
    for index, block in enumerate(blocks):
        if through is not None:
            block = checkpoint_wrapper(block, checkpoint_fn=through)
            blocks[index] = block
        if compile_blocks:
            # What cannot be compiled is an error, not a block that runs eagerly; each length of the context has its own graph.
            block.compile(fullgraph=True, dynamic=False)
    if compile_blocks:
        limit_recompiles()
    if sharding is not None:
        shard(model, blocks, sharding)
    return model


def shard(model: nn.Module, blocks: nn.ModuleList, sharding: Sharding) -> None:
    """Shards each block, then what is left of the model, with FSDP2; gradients are summed over the ranks, not averaged."""
    # FSDP2 warns that an output changed in place would lose its hooks; graphs change nothing in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=sharding.gather, reduce_dtype=wide, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if sharding.offload else OffloadPolicy()
    for module in (*blocks, model):
        fully_shard(
            module, mesh=sharding.mesh, reshard_after_forward=sharding.reshard, mp_policy=policy, offload_policy=offload
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def limit_recompiles() -> None:
    """Makes reaching the recompile limit an error instead of a silent fall back to eager."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
