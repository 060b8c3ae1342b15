"""Batches for a training stage: shuffled by epoch, resumable in the middle of one, through torchdata's stateful loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from sftk.data.latent_sizes import check_batch
from sftk.data.sources import source
from sftk.errors import DataError
from sftk.spec.data_files import found_files
from sftk.spec.schema import Recipe


class EndlessBatches(Sampler[list[int]]):
    """Index batches without end: each epoch is a permutation keyed by the seed and the epoch; a batch may span two.

    With several ranks, `world` batches lie one after the other in the permutation and each rank takes its own: sample i
    of micro-batch m on rank r is sample `(m world + r) batch + i` of the global batch.

    Args:
        size: samples of the data set.
        batch: samples of a batch on one rank.
        seed: of the permutations.
        rank, world: which of how many ranks this is.

    Example:
        >>> batches = iter(EndlessBatches(4, 3, seed=0))
        >>> sorted(next(batches) + next(batches)[:1])
        [0, 1, 2, 3]
    """

    def __init__(self, size: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        if size < 1:
            raise DataError("the data set is empty; expected at least one sample")
        self.size, self.batch, self.seed, self.position = size, batch, seed, 0
        self.rank, self.world = rank, world

    @property
    def stride(self) -> int:
        """Samples that all ranks take at a time."""
        return self.batch * self.world

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        while True:
            indices = []
            first = self.position + self.rank * self.batch
            for place in range(first, first + self.batch):
                if place // self.size != epoch:
                    epoch = place // self.size
                    generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
                    order = torch.randperm(self.size, generator=generator)
                indices.append(int(order[place % self.size]))
            self.position += self.stride
            yield indices


class Loader:
    """Endless batches of one rank, and how far all ranks together have come.

    The position counts samples of the whole run. It depends neither on how a batch is split over ranks and forward passes, nor
    on what workers have read ahead, so that a run goes on with another split from the same sample.

    Args:
        batches: a loader over `sampler`.
        sampler: decides what the next batch is when the loader is asked for it.
        check: looks at each batch before it is used.
    """

    def __init__(
        self,
        batches: StatefulDataLoader,
        sampler: EndlessBatches,
        check: Callable[[Mapping[str, Any]], None] = lambda batch: None,
    ):
        self._batches, self._sampler, self._check = batches, sampler, check
        self.position = 0

    @property
    def dataset(self) -> Any:
        """What is read."""
        return self._batches.dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._sampler.position = self.position
        return self._counted(iter(self._batches))

    def _counted(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self._check(batch)
            self.position += self._sampler.stride
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batches begin, the same on every rank."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, with the next iteration."""
        self.position = state["position"]


def make_loader(recipe: Recipe, beside: Path | None = None, *, rank: int = 0, world: int = 1) -> Loader:
    """The loader of a stage: batches of `batch.per_rank` samples, without end.

    Args:
        recipe: names the data set, its options, workers and the batch.
        beside: the recipe's file, for files that the options name.
        rank, world: which of how many ranks reads.

    Raises:
        DataError: the data set is empty or broken; when a batch is taken: its latents have another size than the recipe's.
    """
    found = source(recipe.data.use)
    options = found_files(recipe.data.use, recipe.data.with_, beside)
    data = found.build(**attrs.asdict(recipe.latents), seed=recipe.seed, options=options)
    batch, _ = recipe.batch.split(world)
    sampler = EndlessBatches(len(data), batch, recipe.seed, rank, world)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        workers = recipe.data.workers
        batches = StatefulDataLoader(data, batch_sampler=sampler, collate_fn=found.collate, num_workers=workers)
    size = attrs.astuple(recipe.latents)
    return Loader(batches, sampler, lambda batch: check_batch(recipe.data.use, batch, size))
