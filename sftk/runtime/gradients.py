"""Gradients over several ranks: summed over all of them, once an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sftk.runtime.mesh import Mesh

BUCKET = 256 << 20
"""Bytes that are reduced together."""


class GradientSync:
    """Sums the gradients of one model over the ranks; in a single process it does nothing.

    A sharded model (FSDP2) reduces its own gradients in the backward pass; here it is told when. A replicated one is left as
    it is and its gradients are reduced after the last backward pass, in buckets: a rollout calls the model dozens of times
    for one backward pass, so that there is little to hide the transfer behind, and PyTorch's DistributedDataParallel expects
    one backward pass for each forward pass.

    Args:
        module: the model.
        mesh: the ranks.
        whole: keep whole gradients between micro-batches and synchronise once an update; False scatters those of a sharded
            model after each.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, *, whole: bool = True):
        self.module, self.mesh, self.keep_whole = module, mesh, whole
        self.sharded = isinstance(module, FSDPModule)
        if isinstance(module, FSDPModule):
            # FSDP2 settles at the first call in what dtype it reduces, from the weights that require a gradient then: none,
            # where an earlier phase only reads the model.
            module._get_fsdp_state()._lazy_init()

    def before_backward(self, *, last: bool) -> None:
        """Says whether the next backward pass is the last one of the update."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last or not self.keep_whole)
            self.module.set_requires_all_reduce(last)

    def finish(self) -> None:
        """After the last backward pass every rank holds the sum."""
        if self.sharded or self.mesh.world == 1:
            return
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        for bucket in _buckets(grads):
            _reduce(bucket)

    def rest(self) -> None:
        """Frees gathered weights: what is registered are the shards again, which optimisers and averages change."""
        for module in self.module.modules() if self.sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()


def _reduce(grads: list[Tensor]) -> None:
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    flat = torch.cat([grad.reshape(-1).to(dtype) for grad in grads])
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])  # pyright: ignore[reportPrivateImportUsage]


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (size + grad.nbytes > BUCKET or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket
