"""Joining the other processes of a run, with a check that all are there and that their collectives work."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from sftk.errors import DistributedError
from sftk.runtime.place import Place, find_place
from sftk.runtime.watch import Watch
from sftk.runtime.world import POLL, World, backend

_LEAVING = 30.0
"""Seconds that the first process waits for the others at the end."""


@contextmanager
def joined(device: str, minutes: float) -> Iterator[World]:
    """Joins the other processes, if there are any, checks that all answer, and leaves at the end.

    Args:
        device: a recipe's `device`.
        minutes: after which a collective that some process never joins fails.

    Raises:
        DistributedError: a process is missing, has no GPU of its own, or collectives between them do not work.

    Example:
        >>> with joined("cpu", minutes=1.0) as world:
        ...     world.rank, world.size
        (0, 1)
    """
    if dist.is_initialized():  # by whoever called us
        yield _already(device)
        return
    place = find_place(os.environ)
    try:
        if place is None or place.size == 1:
            yield World()
            return
        world = _join(place, device, timedelta(minutes=minutes))
        with world.watch.watching(60 * minutes):
            try:
                yield world
                world.leave(_LEAVING)
            except RuntimeError as error:
                explained = world.watch.explain(error)
                if explained is None:
                    raise
                raise DistributedError(explained) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _already(device: str) -> World:
    place = find_place(os.environ)
    size = dist.get_world_size()
    node = place.node if place is not None else size
    world = World(rank=dist.get_rank(), size=size, local_rank=place.local_rank if place else dist.get_rank(), node=node)
    if size > 1:
        world.store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    _take_device(device, world.local_rank)
    return world


def _join(place: Place, device: str, timeout: timedelta) -> World:
    kind = _take_device(device, place.local_rank)
    store = _meet(place, timeout)
    dist.init_process_group(
        backend(kind), store=PrefixStore("group", store), rank=place.rank, world_size=place.size, timeout=timeout
    )
    world = World(rank=place.rank, size=place.size, local_rank=place.local_rank, node=place.node, store=store)
    world.watch = Watch(f"rank {place.rank} ({socket.gethostname()})")
    _try_collective(kind, world)
    return world


def _meet(place: Place, timeout: timedelta) -> Store:
    """The store of this attempt, once every rank is there.

    torchrun's agents keep one store for all attempts, and one that replaces a lost node counts them from 0 again. So each
    rank says a word of its own, and the first rank answers it with the word of this attempt.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            place.host, place.port, is_master=place.rank == 0 and not agent, timeout=timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        message = f"rank {place.rank} of {place.size} ({socket.gethostname()}) cannot reach {place.host}:{place.port}"
        raise DistributedError(f"{message}, where the ranks meet: {error}") from error
    word, size = uuid.uuid4().hex, place.size
    store.set(f"sftk/hello/{place.rank}", word)
    attempt = word if place.rank == 0 else None
    until = time.monotonic() + timeout.total_seconds()
    while True:
        if place.rank == 0:
            _answer(store, size, word)
        elif attempt is None and store.check([f"sftk/welcome/{word}"]):
            attempt = store.get(f"sftk/welcome/{word}").decode()
        if attempt is not None:
            store.set(f"sftk/{attempt}/here/{place.rank}", socket.gethostname())
            missing = [rank for rank in range(size) if not store.check([f"sftk/{attempt}/here/{rank}"])]
            if not missing:
                return PrefixStore(f"sftk/{attempt}", store)
        else:
            missing = [0]
        if time.monotonic() > until:
            waited = f"after {timeout.total_seconds():.0f} s"
            message = f"{size - len(missing)} of {size} ranks are here {waited}, missing {', '.join(map(str, missing))}"
            raise DistributedError(f"{message if attempt else f'rank 0 is not here {waited}'}; look at their logs")
        time.sleep(POLL)


def _answer(store: Store, size: int, attempt: str) -> None:
    for rank in range(1, size):
        if store.check([f"sftk/hello/{rank}"]):
            store.set(f"sftk/welcome/{store.get(f'sftk/hello/{rank}').decode()}", attempt)


def _try_collective(kind: str, world: World) -> None:
    """One small all-reduce: a wrong network interface shows here, not after the weights are read."""
    ones = torch.ones(1, device=kind)
    name = dist.get_backend()
    try:
        dist.all_reduce(ones)
        found = int(ones.item())
    except RuntimeError as error:
        advice = "see that the nodes reach each other on the interface that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names"
        raise DistributedError(f"the first all-reduce over {world.size} ranks ({name}) failed: {error}; {advice}") from error
    if found != world.size:
        raise DistributedError(f"the first all-reduce over {world.size} ranks ({name}) counted {found}; ranks are mixed up")


def _take_device(device: str, local_rank: int) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    there = torch.cuda.device_count()
    index = 0 if there == 1 else local_rank  # srun may show each process its own device alone
    if index >= there or (there == 1 and local_rank and "SLURM_LOCALID" not in os.environ):
        message = f"local rank {local_rank} has no CUDA device of its own: this node shows {there}"
        raise DistributedError(f"{message}; start at most {there} process{'es' * (there != 1)} on it")
    torch.cuda.set_device(index)
    return "cuda"
