"""One rank of many in this process: PyTorch's fake process group, whose collectives move nothing, and what is asked of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftk.functional.exit_key import ExitKey
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.mesh import make_mesh
from sftk.runtime.step import TrainingStep
from sftk.runtime.world import World

NODE = 8
KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "_c10d_functional::all_to_all_single": "all_to_all",
}
NUMBERS = 64
"""Bytes of a collective that sums losses and norms, at most."""


class Recorder(TorchDispatchMode):
    """Kind of a collective to how many there were and the bytes of their whole tensors."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = KINDS.get(func._schema.name)
        if kind is not None:
            size = max(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor))
            ranks = _ranks(args)
            assert kind != "all_reduce" or ranks > 1, "gradients are summed over a group of one"
            if size > NUMBERS and ranks > 1:
                counts = self.found.setdefault(kind, [0, 0])
                counts[0] += 1
                counts[1] += size
        return func(*args, **(kwargs or {}))


def _ranks(args) -> int:
    """Of a collective's group; FSDP2 gathers and scatters what one rank holds alone, too."""
    boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
    return dist.ProcessGroup.unbox(boxed[0]).size() if boxed else 2


@contextmanager
def fake_stage(stage, world: int) -> Iterator[tuple]:
    """Rank 0 of `world`: what is built, and a function that runs a phase and returns what it sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = make_mesh(stage.recipe, World(rank=0, size=world, node=min(NODE, world)), torch.device("cpu"))
        built = build_stage(stage, torch.device("cpu"), {}, mesh)
        loader = make_loader(stage.recipe, rank=mesh.data_rank, world=mesh.data_world)
        batches = iter(loader)

        def run(number: int, exit_index: int = 0) -> dict[str, dict[str, list[int]]]:
            step = TrainingStep(stage.recipe, built, batches, functools.partial(ExitKey, exit_index=exit_index))
            outputs: dict = {}
            inputs: dict = {}
            sent = {}
            for turn in built.turns:
                with Recorder() as recorder:
                    step.run_turn(turn, number, outputs, inputs)
                sent[turn.name] = recorder.found
            return sent

        yield built, run
    finally:
        dist.destroy_process_group()
