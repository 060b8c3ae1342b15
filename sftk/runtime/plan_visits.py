"""How often FSDP2 gathers and reduces the weights of a model in one update, from the order in which it is called."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import attrs


@attrs.frozen
class Visit:
    """A model's forward pass, or the backward pass of one.

    Args:
        task: None for a forward pass, else which `backward()` it belongs to.
        through: whether gradient goes on to the model's inputs.
        sync: whether ranks share gradients in that `backward()` of an update's last micro-batch.
    """

    task: int | None = None
    through: bool = False
    sync: bool = False


@attrs.define
class Counts:
    """How often one unit of a model (a block, or what is left of it) is gathered, reduced and summed over copies."""

    gathers: float = 0.0
    reduces: float = 0.0
    sums: float = 0.0

    def add(self, other: Counts, times: float) -> None:
        """Adds others, `times` over."""
        self.gathers += times * other.gathers
        self.reduces += times * other.reduces
        self.sums += times * other.sums


def count_visits(
    visits: Iterable[Visit], *, root: bool, micro: int, reshard: bool, rests: bool, trained: bool, whole: bool
) -> Counts:
    """Follows a unit through one update.

    A unit is gathered by a forward or backward pass that finds it sharded. It is sharded again after a forward pass
    (`reshard`), and after a backward pass: blocks at once, the root where gradient goes on to its inputs, else at the end.
    Autograd hands out a weight's gradient after the last of its uses in a `backward()`, so there is one reduction for all of
    them, and one before it for what earlier micro-batches left whole, unless both come together.

    Args:
        visits: of one micro-batch, in order. root: the unit is what no block holds.
        micro: micro-batches of the update.
        reshard: see `ParallelSection`. rests: the unit is sharded again at the phase's end in any case.
        trained: it has gradients. whole: they stay whole between micro-batches.

    Example:
        >>> visits = [Visit(), Visit(), Visit(task=1, sync=True)]
        >>> options = {"root": False, "micro": 2, "rests": True, "trained": True, "whole": True}
        >>> count_visits(visits, reshard=True, **options)
        Counts(gathers=6.0, reduces=1.0, sums=1.0)
        >>> count_visits(visits, reshard=False, **options)
        Counts(gathers=2.0, reduces=1.0, sums=1.0)
    """
    visits = list(visits)
    gathered, found = False, Counts()
    for _ in range(2):  # what stays gathered for good was gathered by an earlier update
        found, pending = Counts(), False
        for turn in range(micro):
            for task, group in itertools.groupby(visits, key=lambda visit: visit.task):
                if task is None:
                    for _ in group:
                        found.gathers += not gathered
                        gathered = not reshard
                    continue
                posts, sync = 0, False
                for visit in group:
                    found.gathers += not gathered
                    gathered, sync = root and not visit.through, visit.sync and turn + 1 == micro
                    posts += not gathered
                posts, gathered = posts + gathered, False
                if trained and (sync or not whole):
                    times = 1 + (pending and posts > 1)
                    found.reduces += times
                    found.sums += times if sync else 0
                    pending = False
                elif trained:
                    pending = True
        gathered = gathered and not rests
    return found
