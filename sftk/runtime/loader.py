"""Batches for a training stage: shuffled by epoch, resumable in the middle of one, through torchdata's stateful loader."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from sftk.data.sources import source
from sftk.errors import DataError
from sftk.spec.schema import Recipe


class EndlessBatches(Sampler[list[int]]):
    """Index batches without end: each epoch is a permutation keyed by the seed and the epoch; a batch may span two.

    Args:
        size: samples of the data set.
        batch: samples of a batch.
        seed: of the permutations.

    Example:
        >>> batches = iter(EndlessBatches(4, 3, seed=0))
        >>> sorted(next(batches) + next(batches)[:1])
        [0, 1, 2, 3]
    """

    def __init__(self, size: int, batch: int, seed: int):
        if size < 1:
            raise DataError("the data set is empty; expected at least one sample")
        self.size, self.batch, self.seed, self.position = size, batch, seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        while True:
            indices = []
            for place in range(self.position, self.position + self.batch):
                if place // self.size != epoch:
                    epoch = place // self.size
                    generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
                    order = torch.randperm(self.size, generator=generator)
                indices.append(int(order[place % self.size]))
            self.position += self.batch
            yield indices

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.position = state["position"]


def make_loader(recipe: Recipe) -> StatefulDataLoader:
    """The loader of a stage: batches of `batch.per_rank` samples, without end.

    Args:
        recipe: names the data set, its options, workers and the batch.

    Raises:
        DataError: the data set is empty or broken.
    """
    found = source(recipe.data.use)
    data = found.build(**attrs.asdict(recipe.latents), seed=recipe.seed, options=recipe.data.with_)
    batch = recipe.batch.per_rank or recipe.batch.global_
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(
            data,
            batch_sampler=EndlessBatches(len(data), batch, recipe.seed),
            collate_fn=found.collate,
            num_workers=recipe.data.workers,
        )
