"""The processes of a run, and what they tell each other besides gradients: objects of the host, and waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from sftk.errors import SftkError
from sftk.runtime.watch import Watch

T = TypeVar("T")

POLL = 0.05
"""Seconds between two looks at a store."""


@attrs.define(eq=False)
class World:
    """The processes of a run, as one of them sees them.

    Args:
        rank, size: which of how many. local_rank: on this node. node: processes on this node.
        store: what they share besides collectives; None in a single process.
        watch: is told where this process is.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: int = 1
    store: Store | None = None
    watch: Watch = attrs.field(factory=lambda: Watch("this process"))
    _waits: int = attrs.field(init=False, default=0)

    def wait(self, name: str) -> None:
        """Waits until every process is here; collectives would time out where one works for hours.

        Args:
            name: of the place, for the store.
        """
        if self.store is None:
            return
        self._waits += 1
        self.watch.at(f"the wait for {name}")
        key = f"wait/{name}/{self._waits}"
        if self.store.add(key, 1) == self.size:
            self.store.set(f"{key}/done", "1")
        while not self.store.check([f"{key}/done"]):
            time.sleep(POLL)

    def leave(self, seconds: float) -> None:
        """Says good-bye at a good end. The first process, which may host the store, goes last: others may still ask it.

        Args:
            seconds: that the first one waits at most.
        """
        if self.store is None:
            return
        if self.rank:
            with suppress(RuntimeError):  # the first one has waited long enough
                self.store.add("left", 1)
            return
        until = time.monotonic() + seconds
        while self.store.add("left", 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(POLL)

    def share(self, value: T) -> T:
        """What the first process has, in every process; it is pickled.

        Example:
            >>> World().share({"run": "a"})
            {'run': 'a'}
        """
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank, in every process; it is pickled.

        Example:
            >>> World().gather(3)
            [3]
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def told_by_first(self, ask: Callable[[], T]) -> T:
        """What the first process finds out, in every process: what files say may differ from one moment to the next.

        Raises:
            SftkError, OSError: what it raises, in every process.

        Example:
            >>> World().told_by_first(lambda: "the newest checkpoint")
            'the newest checkpoint'
        """
        if self.size == 1:
            return ask()
        found: tuple[Any, SftkError | OSError | None] = (None, None)
        if self.rank == 0:
            try:
                found = ask(), None
            except (SftkError, OSError) as error:
                found = None, error
        value: Any
        value, failure = self.share(found)
        if failure is not None:
            raise failure
        return value

    def form_group_of_one(self, device: torch.device) -> None:
        """Makes a process group of this process alone, which FSDP2 needs to offload a model."""
        if self.size == 1 and not dist.is_initialized():
            dist.init_process_group(backend(device.type), store=HashStore(), rank=0, world_size=1)


def backend(kind: str) -> str:
    """The collective library for tensors of a kind of device, and for those of the host.

    Example:
        >>> backend("cpu")
        'gloo'
    """
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
