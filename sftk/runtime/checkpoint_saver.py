"""Writes checkpoints in the background: training waits only while its tensors are copied to the host."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from sftk.errors import CheckpointError
from sftk.runtime.checkpoint import begin, publish, unfinished
from sftk.runtime.checkpoint_state import Part, shares
from sftk.runtime.checkpoint_storage import SHARES, WRITERS, PartsWriter, Share, SharePlanner, first_failure, quiet

BLOCK = 1 << 30
"""Bytes of host memory that staging asks for at a time. PyTorch rounds pinned memory up to a power of two."""

_ALIGN = 64


class Saver:
    """Writes a stage's checkpoints, one at a time.

    Args:
        folder: of the stage's checkpoints, which all ranks see.
        keep: how many checkpoints stay.
        background: copy what is to be saved and write while training goes on; otherwise write before it does.
    """

    def __init__(self, folder: Path, keep: int, background: bool = True):
        self._folder, self._keep, self._background = folder, keep, background
        self._staging = Staging()
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, parts: Mapping[str, Part], facts: Mapping[str, Any]) -> Path:
        """Begins to write a checkpoint; it appears when all ranks have written.

        Args:
            step: steps done.
            parts: name to content, the same names on all ranks.
            facts: what `read_facts` gives back.

        Returns:
            The folder that will appear.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()
        folder, keep, facts = self._folder, self._keep, {**facts, "step": step}
        writer = PartsWriter(
            unfinished(folder, step),
            {name: part.metadata for name, part in parts.items()},
            begin=lambda: begin(folder, step),
            publish=lambda: publish(folder, step, facts, keep),
            writers=WRITERS if self._background else 1,
        )
        alone = not dist.is_initialized()
        if self._group is None and not alone:
            # A group of its own: the writing thread and the training one do not take turns.
            self._group = dist.new_group(backend="gloo")  # pyright: ignore[reportAttributeAccessIssue]
        arguments: dict[str, Any] = {
            "storage_writer": writer,
            "planner": SharePlanner(),
            "process_group": self._group,
            "no_dist": alone,
        }
        quiet()
        target = folder / f"step_{step:08d}"
        if self._background:
            future = async_save({SHARES: shares(parts)}, async_stager=self._staging, **arguments)
            assert isinstance(future, Future)
        else:
            future = Future()
            try:
                future.set_result(save({SHARES: shares(parts)}, **arguments))
            except (Exception, CheckpointException) as error:
                future.set_exception(error)
        self._pending = target, future
        return target

    def wait(self) -> None:
        """Until the checkpoint that is being written has appeared.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is None:
            return
        (target, future), self._pending = self._pending, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{target} could not be written: {first_failure(error)}") from error


class Staging(AsyncStager):
    """Copies a rank's shares to the host, pinned where they come from a CUDA device; the memory is kept for the next time."""

    def __init__(self) -> None:
        self._layout: list[Any] = []
        self._buffers: list[Tensor] = []
        self._synchronize_after_execute = False

    def stage(self, state_dict: dict[str, dict[str, Share]]) -> dict[str, dict[str, Share]]:
        """Copies that no later update changes; returns when they are made."""
        shares = state_dict[SHARES]
        values = [share.local.detach() for share in shares.values()]
        layout = [(value.shape, value.dtype, value.is_cuda) for value in values]
        if layout != self._layout:
            self._buffers = []  # first, so that both are never held at once
            self._buffers, self._layout = _allocate(values), layout
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value, non_blocking=True)
        if any(value.is_cuda for value in values):
            torch.cuda.current_stream().synchronize()
        staged = {
            key: Share(local=buffer, offsets=share.offsets, shape=share.shape)
            for (key, share), buffer in zip(shares.items(), self._buffers, strict=True)
        }
        return {SHARES: staged}


def _allocate(values: list[Tensor]) -> list[Tensor]:
    """A place in host memory for each tensor, in blocks of at most `BLOCK` bytes where that holds one."""
    pinned = any(value.is_cuda for value in values)
    sizes = [-(-value.numel() * value.element_size() // _ALIGN) * _ALIGN for value in values]
    buffers: list[Tensor] = []
    first = 0
    while first < len(values):
        last, size = first, 0
        while last < len(values) and (last == first or size + sizes[last] <= BLOCK):
            size += sizes[last]
            last += 1
        block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        start = 0
        for value, taken in zip(values[first:last], sizes[first:last], strict=True):
            held = block[start : start + value.numel() * value.element_size()]
            buffers.append(held.view(value.dtype).view(value.shape))
            start += taken
        first = last
    return buffers
