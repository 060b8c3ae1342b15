"""Scripts as ranks: processes of their own, forked from one that has imported torch, so that they need not."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOAD = ("sftk.runtime.run", "sftk.objectives", "torch._dynamo", "torch.distributed.fsdp")


def forks() -> Any:
    """The context whose processes are forked from one that has imported everything, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def run_ranks(
    script: Path, arguments: Sequence[Sequence[str]], said: Path, env: Mapping[str, str] | None = None, timeout: float = 600
) -> None:
    """Runs a script in as many processes as there are lists of arguments; all must end well.

    Args:
        script: run as `python script arguments`.
        arguments: of each rank.
        said: folder for what each writes to stderr.
        env: further variables; RANK and LOCAL_RANK are added.
    """
    files = [said / f"stderr.{rank}.txt" for rank in range(len(arguments))]
    ranks = [
        forks().Process(target=_run, args=(str(script), list(given), dict(env or {}), rank, str(file)))
        for rank, (given, file) in enumerate(zip(arguments, files, strict=True))
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout)
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks), "\n".join(file.read_text() for file in files)


def _run(script: str, arguments: list[str], env: dict[str, str], rank: int, said: str) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(env | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)})
    import torch

    torch.set_num_threads(1)
    sys.argv, sys.path[:0] = [script, *arguments], [str(Path(script).parent)]
    runpy.run_path(script, run_name="__main__")
