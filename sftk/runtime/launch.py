"""Starts a run's processes on this node, through torchrun's elastic agent, and ends as they end."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sftk.errors import DistributedError
from sftk.runtime.interrupt import exit_code
from sftk.runtime.jobs import available_threads
from sftk.runtime.rundir import RunDir

SHUTDOWN_SECONDS = 600
"""What processes get to write a checkpoint after a signal, before they are killed."""


@attrs.frozen(kw_only=True)
class Launch:
    """The processes of a run.

    Args:
        nproc: on this node.
        nnodes: nodes.
        node_rank: of this node; the one of rank 0 hosts the rendezvous. None: the node that the endpoint names does.
        endpoint: `host:port` where the nodes meet; needed for several.
        max_restarts: how often all processes are started again from the last checkpoint when one dies.

    Raises:
        DistributedError: the nodes have no place to meet, or a number makes no sense.

    Example:
        >>> Launch(nproc=8, nnodes=2, endpoint="gpu-1:29500").ranks
        16
        >>> Launch(nproc=8, nnodes=2, endpoint="gpu-1")
        Traceback (most recent call last):
        sftk.errors.DistributedError: --rdzv-endpoint 'gpu-1': expected HOST:PORT, such as gpu-1:29500
    """

    nproc: int
    nnodes: int = 1
    node_rank: int | None = None
    endpoint: str | None = None
    max_restarts: int = 0

    def __attrs_post_init__(self) -> None:
        if min(self.nproc, self.nnodes) < 1 or self.max_restarts < 0:
            found = f"{self.nproc} processes on each of {self.nnodes} nodes, {self.max_restarts} restarts"
            raise DistributedError(f"{found}: expected at least one process, one node and no less than 0 restarts")
        if self.nnodes > 1 and self.endpoint is None:
            raise DistributedError(f"{self.nnodes} nodes need a place to meet; add --rdzv-endpoint <host of one of them>:29500")
        host, _, port = (self.endpoint or "").rpartition(":")
        if self.endpoint is not None and not (host and port.isascii() and port.isdigit()):
            raise DistributedError(
                f"--rdzv-endpoint {self.endpoint!r}: expected HOST:PORT, such as {host or self.endpoint or 'localhost'}:29500"
            )
        if self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            raise DistributedError(f"--node-rank {self.node_rank} is not among {self.nnodes} nodes, counted from 0")

    @property
    def ranks(self) -> int:
        """Processes of the run, on all nodes."""
        return self.nproc * self.nnodes


def processes(nproc: str) -> int:
    """How many processes `--nproc` asks for: a number, or `auto` for one on each GPU.

    Raises:
        DistributedError: it is neither, or there is no GPU.

    Example:
        >>> processes("4")
        4
    """
    if nproc == "auto":
        if not torch.cuda.is_available():
            raise DistributedError("--nproc auto is one process on each GPU, and there is none; name a number")
        return torch.cuda.device_count()
    if not nproc.isascii() or not nproc.isdigit() or int(nproc) < 1:
        raise DistributedError(f"--nproc {nproc!r}: expected a number of processes, or auto")
    return int(nproc)


def own_address(endpoint: str) -> str | None:
    """The address from which this node reaches the place where nodes meet, which the others can reach, too.

    A node's name, which torchrun would take instead, is often unknown to other nodes, or the same on all of them.

    Args:
        endpoint: `host:port`.

    Returns:
        The address; None when nothing is known but a loopback, as when the endpoint is this node by a name that means itself.

    Example:
        >>> own_address("localhost:29500") is None
        True
    """
    host, _, port = endpoint.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # nothing is sent
            probe.connect(place)
            address = probe.getsockname()[0]
    except (OSError, ValueError):
        return None
    return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address


def launch(arguments: Sequence[str], options: Launch, run: RunDir) -> int:
    """Runs `sftk <arguments>` in every process and waits for the end.

    The first rank writes to this terminal, the others to `logs/rank_<rank>.log` in the run's folder.

    Args:
        arguments: of `sftk`, the same for every process.
        options: how many processes.
        run: whose logs tell what happened.

    Returns:
        The exit code: 0, that of the first process that failed, or `exit_code` of the signal that ended the run.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it has to say is said below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_threads() // options.nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    alone = options.nnodes == 1
    if not alone:  # agents that share a store tell its address once, and a node that replaces a lost one never hears it
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    config = LaunchConfig(
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        nproc_per_node=options.nproc,
        run_id=uuid.uuid4().hex if alone else f"sftk-{run.root.name}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0" if alone else options.endpoint or "",
        local_addr=None if alone else own_address(options.endpoint or ""),
        rdzv_configs={} if options.node_rank is None else {"is_host": options.node_rank == 0},
        max_restarts=options.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    before = signal.signal(signal.SIGUSR1, _pass_on)  # torchrun's agents would die of it and leave their processes alone
    try:
        elastic_launch(config, sys.executable)("-m", "sftk", *arguments)
    except ChildFailedError as error:
        return _explain(error, run)
    except SignalException as stop:
        return exit_code(int(stop.sigval))
    finally:
        signal.signal(signal.SIGUSR1, before)
    return 0


def _pass_on(number: int, frame: Any) -> None:
    """Ends the agent as its own signals do: it sends this one to its processes, and waits for them."""
    raise SignalException(f"received {signal.Signals(number).name}", sigval=signal.Signals(number))


def _explain(error: ChildFailedError, run: RunDir) -> int:
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    log = run.log(rank)
    last = _last_error(log) if rank else None
    where = f"; the end of {log}:\n  {last}" if last else f"; see {log}" if rank and log.exists() else ""
    if rank or code < 0:
        print(f"error: rank {rank} {how}{where}", file=sys.stderr)
    return 128 - code if code < 0 else code


def _last_error(log: Path) -> str | None:
    """The last message of a log that begins with `error:`, or its last line."""
    if not log.is_file():
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else None)
