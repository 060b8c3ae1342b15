"""What errors say of a lost rank: by who raised them, whatever their words."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sftk.runtime.watch import Watch


def explained(error):
    watch = Watch("rank 0")
    watch.at("step 2, phase 'critic'")
    return watch.explain(error)


def gloo_groups(seconds):
    """Two ranks of this process."""
    store, groups = dist.HashStore(), {}

    def join(rank):
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=seconds))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return groups


@pytest.mark.parametrize("gone", [False, True], ids=["silent", "gone"])
def test_a_collective_of_gloo_without_the_other_rank(gone):
    groups = gloo_groups(0.5)
    if gone:
        del groups[1]
    with pytest.raises(RuntimeError) as raised:
        groups[0].allreduce([torch.ones(1)]).wait()
    said = "Connection closed by peer" if gone else "Timed out waiting 500ms"
    assert said in explained(raised.value)
    assert explained(raised.value).startswith("rank 0 waited for another rank in step 2, phase 'critic': [")


def test_a_store_that_nobody_answers_or_whose_host_is_gone():
    host = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=0.2))
    with pytest.raises(RuntimeError) as silent:
        host.get("never set")
    client = dist.TCPStore("localhost", host.port, is_master=False, timeout=timedelta(seconds=5))
    del host
    with pytest.raises(RuntimeError) as gone:
        client.check(["here"])
    for error in (silent.value, gone.value):
        assert explained(error).startswith("rank 0 waited for another rank in step 2, phase 'critic': ")


@pytest.mark.parametrize(
    ("result", "lost"),
    [
        ("remote process exited or there was a network error\nncclRemoteError: A call failed", True),
        ("unhandled system error\nncclSystemError: System call (e.g. socket, malloc) failed", True),
        ("NCCL communicator was aborted on rank 0", True),
        ("unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nsocket", False),
        ("invalid usage\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.", False),
        ("invalid argument\nncclInvalidArgument: Invalid value for an argument.", False),
    ],
)
def test_errors_of_nccl_that_another_rank_caused_and_own_ones(result, lost):
    found = explained(dist.DistBackendError(f"NCCL error in: NCCLUtils.cpp:77, {result}"))
    assert (found is not None) == lost
    assert found is None or "\n" not in found


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a reward's server did not answer: socket timed out"),
        RuntimeError("The size of tensor a (4) must match; see option `timeout`"),
        RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4"),
        RuntimeError("reading [gloo/transport/tcp/pair.cc:1] failed"),
        NotImplementedError("broken pipe"),
        TimeoutError("timed out"),
        RuntimeError(),
    ],
    ids=lambda error: str(error)[:20],
)
def test_no_words_make_another_error_that_of_a_lost_rank(error):
    assert explained(error) is None


def test_an_error_without_words():
    assert explained(dist.DistNetworkError()) == "rank 0 waited for another rank in step 2, phase 'critic': DistNetworkError"
