"""What a recipe says about several ranks (processes, one for each device): `parallel`, and `parallel` of a model."""

from __future__ import annotations

from typing import Literal

import attrs

from sftk.spec.validators import at_least

Shard = Literal["all", "node"] | int
"""Over how many ranks weights are sharded: all, those of a node, or so many; 1 gives every rank a whole copy."""


@attrs.frozen(kw_only=True)
class ParallelSection:
    """How the ranks of a run share weights and samples. It changes no result; one process ignores it, but for `offload`.

    Weights are sharded over `shard` consecutive ranks and replicated over the groups of so many: `all` is FSDP, `node` is
    HSDP (sharded within a node, replicated across nodes), 1 is plain data parallelism. `sequence` consecutive ranks share
    one sample, each with a part of its tokens. A model may say otherwise for itself, see `ModelParallel`.

    Args:
        shard: over how many ranks weights, gradients, averages and optimiser states are sharded.
        sequence: ranks that share one sample; divides the number of attention heads.
        reshard: free gathered weights after each forward pass; false keeps them until the phase ends, and so gathers them
            once for a whole rollout.
        offload: keep shards in the host's memory, and the optimiser's work there.
        accumulate: what holds gradients between micro-batches. `whole` gradients on each rank are synchronised once an
            update; `sharded` ones after every micro-batch, which takes less memory and more communication.
        timeout: minutes after which a collective that some rank never joined ends the run.
    """

    shard: Shard = attrs.field(default="all", validator=at_least(1))  # pyright: ignore[reportAssignmentType]
    sequence: int = attrs.field(default=1, validator=at_least(1))
    reshard: bool = True
    offload: bool = False
    accumulate: Literal["whole", "sharded"] = "whole"
    timeout: float = attrs.field(default=10.0, validator=at_least(0.01))


@attrs.frozen(kw_only=True)
class ModelParallel:
    """What one model does otherwise than the recipe's `parallel`; null takes what that says.

    Args:
        shard, reshard, offload: see `ParallelSection`.
    """

    shard: Shard | None = attrs.field(default=None, validator=at_least(1))
    reshard: bool | None = None
    offload: bool | None = None

    def over(self, section: ParallelSection) -> ModelParallel:
        """This policy, with what it leaves open taken from the recipe's.

        Example:
            >>> ModelParallel(offload=True).over(ParallelSection(shard="node"))
            ModelParallel(shard='node', reshard=True, offload=True)
        """
        given = attrs.asdict(self)
        return ModelParallel(**{name: getattr(section, name) if value is None else value for name, value in given.items()})
