"""Joining the other processes of a run."""

from __future__ import annotations

import socket
import threading

import pytest
from torch._C._distributed_c10d import HashStore

from sftk.errors import DistributedError
from sftk.runtime.join import joined
from sftk.runtime.world import World


def test_the_first_rank_leaves_last():
    store = HashStore()
    first, *others = (World(rank=rank, size=3, store=store) for rank in range(3))
    going = threading.Thread(target=first.leave, args=(30.0,))
    going.start()
    others[0].leave(30.0)
    going.join(0.3)
    assert going.is_alive()
    others[1].leave(30.0)
    going.join(5)
    assert not going.is_alive()
    World(rank=0, size=2, store=HashStore()).leave(0.1)  # the other died: not for ever


def test_ranks_that_never_come_are_named(monkeypatch):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    env = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="1 of 3 ranks are here after 1 s, missing 1, 2"), joined("cpu", 0.02):
        pass
