"""Joining the other processes of a run."""

from __future__ import annotations

import socket

import pytest

from sftk.errors import DistributedError
from sftk.runtime.join import joined


def test_ranks_that_never_come_are_named(monkeypatch):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    env = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="1 of 3 ranks are here after 1 s, missing 1, 2"), joined("cpu", 0.02):
        pass
