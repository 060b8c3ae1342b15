"""Latents for prompts from a model, all frames of a batch at once; `sftk.runtime.streaming` makes them block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sftk.core.graph import Graph
from sftk.data.sources import DataSource
from sftk.functional.keys import Key
from sftk.runtime.mesh import Mesh


@torch.no_grad()
def sample_latents(
    graph: Graph,
    denoiser: Any,
    prompts: Sequence[str],
    data: DataSource,
    shape: tuple[int, int, int, int],
    *,
    seed: int,
    device: torch.device,
    batch: int = 64,
    extra: Mapping[str, Tensor] | None = None,
    mesh: Mesh | None = None,
) -> Tensor:
    """Latents for prompts, each with noise keyed by its place in the list, so that the batch size does not matter.

    Several ranks share the prompts. Each makes the same number of passes, as sharded models need every rank in each.

    Args:
        graph: from `sampler_graph`.
        denoiser: the model port.
        prompts: texts.
        data: embeds them.
        shape: frames, channels, height, width.
        seed: of the noise.
        batch: prompts in one pass.
        extra: further inputs of the graph, [N, ...] each, such as `initial_latents`.
        mesh: the ranks; None is one.

    Returns:
        [N, F, C, H, W] float32, on the CPU; the same on every rank.
    """
    assert data.embed is not None
    found = []
    mesh = mesh or Mesh.single(device)
    for places in shared_places(len(prompts), batch, mesh.data_rank, mesh.data_world):
        part = [prompts[place] for place in places]
        key = Key(seed=seed, phase="sample", samples=places)
        values: dict[str, Any] = {
            "key": key,
            "noise": key.normal("noise", shape, device=device),
            "prompt_embeds": data.embed(part).to(device),
            "negative_embeds": data.embed([""] * len(part)).to(device),
        }
        values |= {name: tensor[list(places)].to(device) for name, tensor in (extra or {}).items()}
        wanted = (*graph.inputs, *graph.optional)
        x0 = graph.run({name: value for name, value in values.items() if name in wanted}, {"denoiser": denoiser})["x0"]
        found.append(x0.float().cpu())
    return torch.cat(mesh.gather(torch.cat(found))[:: mesh.sequence])[: len(prompts)]


def shared_places(count: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[tuple[int, ...]]:
    """Which of `count` places a rank works on in each pass; where the last ranks run out, they repeat the last place.

    Example:
        >>> [list(shared_places(7, 2, rank, 3)) for rank in range(3)]
        [[(0, 1), (2,)], [(3, 4), (5,)], [(6, 6), (6,)]]
        >>> list(shared_places(5, 2))
        [(0, 1), (2, 3), (4,)]
    """
    each = -(-count // world)
    for start in range(rank * each, (rank + 1) * each, batch):
        stop = min(start + batch, (rank + 1) * each)
        yield tuple(min(place, count - 1) for place in range(start, stop))
