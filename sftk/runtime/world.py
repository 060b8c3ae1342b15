"""Joining the other processes of a run: from torchrun's environment or Slurm's, with a check that all are there."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from sftk.errors import DistributedError, SftkError
from sftk.runtime.watch import Watch

T = TypeVar("T")

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_POLL = 0.05  # seconds


@attrs.frozen(kw_only=True)
class Place:
    """Where a launcher put this process.

    Args:
        rank, size: of the run. local_rank: on this node. node: processes on this node.
        host, port: where the processes meet.
    """

    rank: int
    size: int
    local_rank: int
    node: int
    host: str
    port: int


def find_place(env: Mapping[str, str]) -> Place | None:
    """What the environment says of this process; None for one that runs by itself.

    `torchrun` sets RANK and its like, `srun` SLURM_PROCID and its like for each step. A shell of a Slurm job has no step of
    its own and counts as one process.

    Raises:
        DistributedError: torchrun's variables are there in part, or are no numbers.

    Example:
        >>> find_place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        ...     "MASTER_ADDR": "gpu-1", "MASTER_PORT": "29500"})
        Place(rank=3, size=4, local_rank=1, node=2, host='gpu-1', port=29500)
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in TORCHRUN if name not in env]
        if missing:
            found = " and ".join(name for name in TORCHRUN if name in env)
            message = f"the environment has {found} but not {', '.join(missing)}"
            raise DistributedError(f"{message}; start with `sftk run --nproc`, torchrun or srun, which set them all")
        rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        node = _number(env, "LOCAL_WORLD_SIZE", size)
        local = _number(env, "LOCAL_RANK", rank % node)
        return Place(
            rank=rank, size=size, local_rank=local, node=node, host=env["MASTER_ADDR"], port=_number(env, "MASTER_PORT")
        )
    if all(name in env for name in SLURM) and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        node = int(re.split(r"[,(]", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))[0])
        return Place(
            rank=_number(env, "SLURM_PROCID"),
            size=_number(env, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(env, "SLURM_LOCALID"),
            node=node,
            host=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
            port=_number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000),
        )
    return None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    Example:
        >>> first_host("gpu[003-010,12],cpu1"), first_host("a-1,a-2")
        ('gpu003', 'a-1')
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    assert match is not None, f"Slurm gave an empty node list {nodes!r}"
    return match[1] + (match[2] or "")


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
            time.sleep(_POLL)

    def share(self, value: T) -> T:
        """What the first process has, in every process; it is pickled."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank, in every process; it is pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def told_by_first(self, ask: Callable[[], T]) -> T:
        """What the first process finds out, in every process: what files say may differ from one moment to the next.

        Raises:
            SftkError, OSError: what it raises, in every process.
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
            dist.init_process_group(_backend(device.type), store=HashStore(), rank=0, world_size=1)


@contextmanager
def joined(device: str, minutes: float) -> Iterator[World]:
    """Joins the other processes, if there are any, checks that all answer, and leaves at the end.

    Args:
        device: a recipe's `device`.
        minutes: after which a collective that some process never joins fails.

    Raises:
        DistributedError: a process is missing, or the collective library does not work between them.
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
            except RuntimeError as error:
                explained = world.watch.explain(error)
                if explained is None:
                    raise
                raise DistributedError(explained) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun's agent has started this process again after a failure.

    Example:
        >>> restarts()
        0
    """
    return _number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)


def redirect_output(log: Path) -> None:
    """Sends everything that this process prints, libraries included, to a file's end from now on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


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
        _backend(kind), store=PrefixStore("group", store), rank=place.rank, world_size=place.size, timeout=timeout
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
        time.sleep(_POLL)


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


def _backend(kind: str) -> str:
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name, default)
    try:
        return int(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise DistributedError(f"{name} in the environment is {value!r}; expected a number") from None
