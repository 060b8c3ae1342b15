"""One rank of four: saves models that are sharded in several ways, and loads each under every other way.

`python checkpoint_rank.py RANK FOLDER`; a checkpoint of each way is left in FOLDER/<way>, the whole tensors in FOLDER/whole.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sftk.errors import CheckpointError
from sftk.runtime.build import Built
from sftk.runtime.checkpoint_restore import restore
from sftk.runtime.checkpoint_saver import Saver
from sftk.runtime.checkpoint_state import optimizer_parts, weight_parts
from sftk.runtime.mesh import Mesh

WAYS = {"fsdp": (1, 4), "hsdp": (2, 2), "ddp": None}
"""Replicas and shards, or plain tensors that all ranks hold."""


def make(way: str, seed: int) -> Built:
    """A model of uneven sizes (5 and 3 rows over 4 ranks), and an optimiser that has stepped twice."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))
    shape = WAYS[way]
    if shape is not None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh if shape[0] > 1 else mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model(torch.linspace(-1, 1, 14).reshape(2, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    empty: dict[str, Any] = {field.name: {} for field in attrs.fields(Built)}
    return Built(**empty | {"modules": {"net": model}, "optimizers": {"net": optimizer}, "mesh": Mesh.single()})


def whole(built: Built) -> dict[str, torch.Tensor]:
    parts = weight_parts(built.modules, 0) | optimizer_parts(built)
    tensors = {f"{part}/{name}": tensor for part, content in parts.items() for name, tensor in content.tensors.items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def save(built: Built, folder: Path, background: bool) -> None:
    saver = Saver(folder, 1, background)
    saver.save(2, weight_parts(built.modules, 2) | optimizer_parts(built), {})
    saver.wait()


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=4)
    expected = whole(make("ddp", 0))
    for way in WAYS:
        save(make(way, 0), folder / way, background=way != "hsdp")
        assert (folder / way / "step_00000002").is_dir(), "visible on every rank when wait returns"
        for other in WAYS:
            built = make(other, 1)
            restore(folder / way / "step_00000002", built, ["net"])
            found = whole(built)
            assert found.keys() == expected.keys()
            different = [name for name in found if not torch.allclose(found[name], expected[name], rtol=0, atol=1e-6)]
            assert not different, (way, other, different)
    with pytest.raises(CheckpointError, match="has no weights of 'net'"):
        restore(folder / "nothing", built, ["net"])
    if rank == 0:
        torch.save(expected, folder / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
