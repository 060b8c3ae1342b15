"""Who is who among the processes of a run: ranks, process groups and device meshes, said here and nowhere else.

A run has `world` ranks, one process for each device. They are arranged twice (see `sftk.spec.arrangement.Arrangement`):

* **for weights**, role by role, as `replicate x shard`: `Mesh.weights(role)` is the `DeviceMesh` with these two names, on
  which FSDP2 shards the role (`sftk.runtime.parallelize`); with `shard` alone where all ranks hold one copy, as FSDP2 sums
  gradients over a single copy, too. It covers all ranks, those of a sequence group among them.
* **for samples** as `data x sequence`: `Mesh.samples` is the `DeviceMesh` with these two names. The ranks of one sequence
  group see the same samples, the same noise and the same exit steps; `data_rank` of `data_world` says which samples.

One process needs no process group: `Mesh.single()` has `world` 1, and everything below does nothing there.

**What is summed.** Each rank differentiates the loss of its own samples; every rank of a sequence group computes the same loss
from whole tensors, and its gradient of a weight is the part that is due to its own tokens. The gradient of a weight is the sum
over all ranks, divided by the global weight of the loss; nothing is averaged. Losses, their weights and metrics are summed over
all ranks and divided by `sequence`, as each sample is counted on every rank of its group.

**Agreement.** Whatever decides control flow comes from the recipe, from `Key.integers` or from `Mesh.share`, never from a
tensor of one rank: ranks that take different numbers of forward passes of a sharded model hang.

Public: `Mesh` (`rank`, `world`, `first`, `device`, `data_rank`, `data_world`, `sequence`, `sequence_rank`,
`sequence_group`, `samples`, `weights(role)`, `shards(role)`, `sum`, `share`, `gather`, `wait`), `make_mesh`.
"""

from __future__ import annotations

from typing import TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sftk.runtime.world import World
from sftk.spec.arrangement import Arrangement, arrange_ranks
from sftk.spec.schema import Recipe

T = TypeVar("T")


@attrs.define(eq=False)
class Mesh:
    """The ranks of a stage; see the module's text.

    Args:
        world_: the processes, from `sftk.runtime.join.joined`.
        arrangement: how many share what.
        device: of this rank.

    Example:
        >>> mesh = Mesh.single()
        >>> mesh.world, mesh.first, mesh.data_rank, mesh.sequence_group, mesh.sum(torch.ones(1)).item()
        (1, True, 0, None, 1.0)
    """

    world_: World
    arrangement: Arrangement
    device: torch.device
    _weights: dict[tuple[int, bool], DeviceMesh] = attrs.field(init=False, factory=dict)
    _samples: DeviceMesh | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        if self.world > 1:
            shape, names = (self.data_world, self.sequence), ("data", "sequence")
            self._samples = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        for shards in sorted(set(self.arrangement.shards.values())):  # groups are made by all ranks, in one order
            if self.world > 1:
                self._copies_by_shard(shards, partial_sums=False)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Mesh:
        """One process."""
        alone = Arrangement(ranks=1, sequence=1, per_rank=1, accumulation=1, shards={})
        return cls(World(), alone, torch.device(device))

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return self.world_.rank

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.world_.size

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def sequence(self) -> int:
        """Ranks that share one sample."""
        return self.arrangement.sequence

    @property
    def sequence_rank(self) -> int:
        """Place among the ranks that share this one's samples, from 0."""
        return self.rank % self.sequence

    @property
    def data_rank(self) -> int:
        """Which samples this rank sees: those of the so many-th of `data_world` parts of a batch."""
        return self.rank // self.sequence

    @property
    def data_world(self) -> int:
        """Parts of a batch."""
        return self.world // self.sequence

    @property
    def samples(self) -> DeviceMesh:
        """The mesh `("data", "sequence")`; there is none in a single process."""
        assert self._samples is not None, "a single process has no mesh"
        return self._samples

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this one's samples; None where it has them to itself."""
        return self.samples.get_group("sequence") if self.sequence > 1 else None

    def weights(self, role: str, *, partial_sums: bool = False) -> DeviceMesh:
        """The mesh `("replicate", "shard")` of a role's weights, `("shard",)` where there is one copy of them.

        In a single process it needs a group of one, which is made.

        Args:
            partial_sums: two dimensions in any case. FSDP2 then adds up the gradients of micro-batches in the dtype in which
                they are sent, and otherwise in that of the weights, which may be a narrower one.
        """
        if self.world == 1:
            self.world_.form_group_of_one(self.device)
        return self._copies_by_shard(self.shards(role), partial_sums=partial_sums)

    def shards(self, role: str) -> int:
        """Ranks that hold one copy of a role's weights."""
        return self.arrangement.shards.get(role, 1)

    def _copies_by_shard(self, shards: int, *, partial_sums: bool) -> DeviceMesh:
        copies = self.world // shards
        both = copies > 1 or partial_sums
        if (shards, both) not in self._weights:
            shape, names = ((copies, shards), ("replicate", "shard")) if both else ((shards,), ("shard",))
            self._weights[shards, both] = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self._weights[shards, both]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, of any shape and dtype, on its device; nothing is read back, and `value` stays as it is."""
        if self.world == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    def share(self, value: T) -> T:
        """What the first rank has, on every rank; it is pickled."""
        return self.world_.share(value)

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank, on every rank; it is pickled."""
        return self.world_.gather(value)

    def wait(self, name: str) -> None:
        """Waits until every rank is here, however long that takes: for one that makes data, say.

        Args:
            name: of this place.
        """
        self.world_.wait(name)


def make_mesh(recipe: Recipe, world: World, device: torch.device) -> Mesh:
    """The ranks of a stage, arranged as its recipe says.

    Raises:
        SpecError: the ranks or the batch do not divide so.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> mesh = make_mesh(load_recipe("recipes/dmd.yaml")[0].recipe, World(), torch.device("cpu"))
        >>> mesh.arrangement.per_rank, mesh.arrangement.accumulation
        (16, 1)
    """
    return Mesh(world, arrange_ranks(recipe, world.size, world.node), device)
