"""Batches: every sample once an epoch, the same ones however a step is split, resumable anywhere."""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch

from sftk.data.lmdb_store import LatentStore, write_store
from sftk.errors import DataError, SpecError
from sftk.runtime.loader import EndlessBatches, make_loader
from sftk.runtime.shapes import check_shapes
from sftk.spec.recipe import load_recipe


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def test_epochs_are_permutations_and_batches_span_them():
    flat = list(itertools.chain(*take(EndlessBatches(5, 3, seed=1), 10)))
    epochs = [flat[start : start + 5] for start in range(0, 30, 5)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 6
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert flat != list(itertools.chain(*take(EndlessBatches(5, 3, seed=2), 10)))


@pytest.mark.parametrize("split", [1, 2, 4])
def test_the_split_does_not_matter(split):
    whole = list(itertools.chain(*take(EndlessBatches(7, 4, seed=0), 6)))
    assert list(itertools.chain(*take(EndlessBatches(7, split, seed=0), 24 // split))) == whole


def test_a_batch_larger_than_the_data():
    (batch,) = take(EndlessBatches(2, 5, seed=0), 1)
    assert (len(batch), set(batch)) == (5, {0, 1})


def test_an_empty_data_set():
    with pytest.raises(DataError, match="the data set is empty"):
        EndlessBatches(0, 1, seed=0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_take_disjoint_parts_of_each_global_batch(world):
    whole = take(EndlessBatches(11, 2 * world, seed=4), 8)
    ranks = [take(EndlessBatches(11, 2, 4, rank, world), 8) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    sampler = EndlessBatches(11, 2, 4, world - 1, world)
    take(sampler, 3)
    again = EndlessBatches(11, 2, 4, world - 1, world)
    again.position = sampler.position
    assert take(again, 5) == ranks[-1][3:]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_resumed_in_the_middle_of_an_epoch(tiny, workers, done):
    (stage,) = load_recipe(tiny(), [f"data.workers={workers}"])
    loader = make_loader(stage.recipe)
    batches = iter(loader)
    _, state = [next(batches) for _ in range(done)], loader.state_dict()
    wanted = [next(batches) for _ in range(3)]
    again = make_loader(stage.recipe)
    again.load_state_dict(state)
    found = list(itertools.islice(again, 3))
    assert [batch["prompt"] for batch in found] == [batch["prompt"] for batch in wanted]
    assert all(torch.equal(one["latents"], other["latents"]) for one, other in zip(found, wanted, strict=True))
    assert found[0]["latents"].shape == (2, 6, 4, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_other_ranks_go_on_from_the_same_sample(tiny, workers):
    def loader(per_rank, rank, world):
        changes = ["batch.global=4", f"batch.per_rank={per_rank}", f"data.workers={workers}"]
        return make_loader(load_recipe(tiny(), changes)[0].recipe, rank=rank, world=world)

    def latents(loaders, count):
        parts = zip(*(itertools.islice(one, count) for one in loaders), strict=True)
        return torch.cat([batch["latents"] for batches in parts for batch in batches])

    whole = latents([loader(4, 0, 1)], 9)
    position, found = 0, []
    for world, per_rank, updates in ((4, 1, 3), (2, 1, 2), (1, 4, 3), (2, 2, 1)):
        loaders = [loader(per_rank, rank, world) for rank in range(world)]
        for one in loaders:
            one.load_state_dict({"position": position})
        found.append(latents(loaders, updates * 4 // (per_rank * world)))
        (position,) = {one.state_dict()["position"] for one in loaders}
        assert position == 4 * (updates + sum(len(part) for part in found[:-1]) // 4)
    assert torch.equal(torch.cat(found), whole)


def test_workers_read_the_same_batches(tiny):
    recipes = [load_recipe(tiny(), [f"data.workers={workers}"])[0].recipe for workers in (0, 2)]
    plain, worked = ([batch["prompt"] for batch in itertools.islice(make_loader(recipe), 5)] for recipe in recipes)
    assert plain == worked


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of 23 clips in three shards; the value of each is its number."""
    path = tmp_path_factory.mktemp("store") / "clips"
    clips = [(torch.full((6, 4, 8, 8), float(i)), f"a {i % 10} moving left") for i in range(23)]
    write_store(path, clips, shards=3)
    return path


def numbers(batch):
    return batch["latents"][:, 0, 0, 0, 0].int().tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_store_resumed_in_the_middle_of_an_epoch(tiny, store, workers):
    change = "use: digits, with: {split: train, size: 7}", f"use: latents, with: {{path: {store}, text: digits}}"
    (stage,) = load_recipe(tiny(*change), [f"data.workers={workers}"])
    whole = make_loader(stage.recipe)
    wanted = [numbers(batch) for batch in itertools.islice(whole, 30)]
    assert sorted(list(itertools.chain(*wanted))[:23]) == list(range(23))
    for done in (1, 5, 14):
        first, batches = make_loader(stage.recipe), []
        for batch in first:
            batches.append(numbers(batch))
            if len(batches) == done:
                break
        again = make_loader(stage.recipe)
        again.load_state_dict(first.state_dict())
        found = list(itertools.islice(again, 6))
        assert batches + [numbers(batch) for batch in found] == wanted[: done + 6]
        assert found[0]["prompt"] == [f"a {n % 10} moving left" for n in numbers(found[0])]


def test_workers_survive_a_fork_after_the_store_was_read(tiny, store):
    assert LatentStore.open(store)[0][1] == "a 0 moving left"
    change = "use: digits, with: {split: train, size: 7}", f"use: latents, with: {{path: {store}, text: digits}}"
    (stage,) = load_recipe(tiny(*change), ["data.workers=2"])
    reader = LatentStore.open(store)
    assert reader[3][1] == "a 9 moving left"
    assert len(list(itertools.islice(make_loader(stage.recipe), 4))) == 4
    assert reader[1][1] == "a 3 moving left"


PLUGIN = """\
import torch

from sftk.data.sources import SOURCES, DataSource
from torch.utils.data import default_collate


def clips(*, frames, seed, key="latents", shape=()):
    sample = {"prompt_embeds": torch.zeros(4, 32), "negative_embeds": torch.zeros(4, 32), "prompt": "a fox"}
    return [sample | {key: torch.zeros(shape)}] * 5


SOURCES["clips of any size"] = DataSource(
    make=clips, collate=default_collate, keys=("latents", "prompt_embeds", "negative_embeds", "initial_latents")
)
"""


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("latents", [6, 4, 8, 8], None),
        ("initial_latents", [1, 4, 8, 8], None),
        (
            "latents",
            [6, 16, 8, 8],
            r"\[6, 16, 8, 8\], the recipe says \[6, 4, 8, 8\] .*; set latents: {frames: 6, channels: 16, ",
        ),
        ("latents", [9, 4, 8, 8], r"\[9, 4, 8, 8\], the recipe says .*; set latents: {frames: 9, channels: 4, "),
        ("initial_latents", [1, 4, 8, 9], r"\[1, 4, 8, 9\], .* says \[4, 8, 8\] .*; set latents: {channels: 4, .*width: 9}"),
        ("ode_latents", [5, 3, 4, 8, 8], r"\[5, 3, 4, 8, 8\], the recipe says \[6, 4, 8, 8\] .*; set latents: {frames: 3, "),
        ("latents", [8], r"\[8\], the recipe says .*; let the data set give that size"),
    ],
)
def test_data_of_another_size_than_the_recipe_s(tiny, tmp_path, key, shape, said):
    """Said by `sftk check --shapes` with its place, and before a model sees a batch, from a process that reads ahead, too."""
    (tmp_path / "any_size.py").write_text(PLUGIN)
    data = f"use: clips of any size, with: {{key: {key}, shape: {shape}}}"
    changes = "version: 1", "version: 1\nplugins: [any_size.py]", "use: digits, with: {split: train, size: 7}", data
    (stage,) = load_recipe(tiny(*changes))
    begins = f"the data set 'clips of any size' gives, as `{key}`, latents of "
    if said is None:
        check_shapes(stage)
        assert next(iter(make_loader(stage.recipe)))[key].shape[1:] == torch.Size(shape)
        return
    with pytest.raises(SpecError, match=begins + said + r".* @ \$\.data \(.*tiny.yaml:\d+\)"):
        check_shapes(stage)
    for workers in (0, 1):
        recipe = attrs.evolve(stage.recipe, data=attrs.evolve(stage.recipe.data, workers=workers))
        with pytest.raises(DataError, match=begins + said):
            next(iter(make_loader(recipe)))


def test_a_store_of_another_size_than_the_recipe_s(tiny, train, store):
    change = "use: digits, with: {split: train, size: 7}", f"use: latents, with: {{path: {store}, text: digits}}"
    said = (
        r"clips holds latents of \[6, 4, 8, 8\], the recipe says \[12, 4, 8, 8\] .*; set latents: {frames: 6, .*}.*, or name a"
    )
    (stage,) = load_recipe(tiny(*change), ["latents.frames=12"])
    with pytest.raises(DataError, match=said):
        make_loader(stage.recipe)
