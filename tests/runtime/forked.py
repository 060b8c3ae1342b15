"""Programs as ranks: processes of their own, forked from one that has imported torch, so that they need not."""

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


def start_rank(
    rank: int,
    program: Path | str,
    arguments: Sequence[str],
    said: Path,
    env: Mapping[str, str] | None = None,
    cwd: str | Path = ".",
) -> Any:
    """Starts `python program arguments`, or `python -m program arguments` where a module is named.

    Args:
        rank: for RANK and LOCAL_RANK.
        program: a file, or a module's name.
        said: file for what it writes to stderr.
        env: further variables.
    """
    process = forks().Process(target=_run, args=(rank, program, list(arguments), said, dict(env or {}), Path(cwd).resolve()))
    process.start()
    return process


def run_ranks(
    script: Path, arguments: Sequence[Sequence[str]], folder: Path, env: Mapping[str, str] | None = None, timeout: float = 600
) -> None:
    """Runs a script in as many processes as there are lists of arguments; all must end well. They write errors in `folder`."""
    files = [folder / f"stderr.{rank}.txt" for rank in range(len(arguments))]
    ranks = [
        start_rank(rank, script, given, file, env) for rank, (given, file) in enumerate(zip(arguments, files, strict=True))
    ]
    try:
        for rank in ranks:
            rank.join(timeout)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks), "\n".join(file.read_text() for file in files)


def _run(rank: int, program: Path | str, arguments: list[str], said: Path, env: dict[str, str], cwd: Path) -> None:
    for number, name in ((1, os.devnull), (2, said)):
        with open(name, "w") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(env | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
