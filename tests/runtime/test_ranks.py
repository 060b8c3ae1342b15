"""Several processes (gloo) give the weights and metrics of one, however weights are shared and a batch is split."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import pytest
import torch
from forked import run_ranks

from sftk.models.weights import save_weights

JOB = Path(__file__).with_name("rank_job.py")
BATCH = ("batch.global=8", "batch.per_rank=1", "phases.0.every=1")
POLICIES = {
    "fsdp": (),
    "hsdp": ("parallel.shard=2",),
    "ddp": ("parallel.shard=1",),
    "mixed": (
        "parallel.accumulate=sharded",
        "parallel.reshard=false",
        "models.generator.parallel.shard=2",
        "models.generator.checkpoint=full",
        "models.real_score.parallel={shard: 1, offload: true}",
    ),
    "replay": ("phases.generator.backward=replay", "parallel.shard=2"),
    "whole": ("batch.per_rank=null",),
    "sequence_2": ("parallel.sequence=2",),
    "sequence_4": ("parallel.sequence=4", "parallel.shard=2", "models.generator.checkpoint=full"),
    "sequence_2_ddp": ("parallel.sequence=2", "parallel.shard=1"),
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(world, jobs)`: runs jobs (name to recipe, overrides, steps) in `world` processes, or for 1 in this one.

    Returns the folder of what they found.
    """

    def run(world: int, jobs: dict[str, tuple[Path, tuple[str, ...], int]]) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        listed = [{"name": n, "recipe": str(r), "overrides": list(o), "steps": s} for n, (r, o, s) in jobs.items()]
        (folder / "jobs.json").write_text(json.dumps(listed))
        if world == 1:
            spec = importlib.util.spec_from_file_location("rank_job", JOB)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.run_jobs(folder / "jobs.json")
            return folder
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(world)}
        run_ranks(JOB, [[str(folder / "jobs.json")]] * world, folder, meet | {"WORLD_SIZE": str(world)})
        return folder

    return run


def largest_difference(one, other):
    """Over all weights and averages, and the largest weight."""
    assert one.keys() == other.keys()
    assert "generator.ema" in one
    pairs = [(tensor, other[part][name]) for part, state in one.items() for name, tensor in state.items()]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    difference = max((a - b).abs().max().item() for a, b in pairs if a.numel())
    return difference, max(a.abs().max().item() for a, _ in pairs if a.numel())


def assert_equal_to(one, folder, name, precision):
    other = torch.load(folder / f"{name}.pt")
    difference, largest = largest_difference(one["weights"], other["weights"])
    assert difference < (1e-9 if precision == "fp64" else 1e-5 * largest)
    for row, found in zip(one["metrics"], other["metrics"], strict=True):
        assert row == pytest.approx(found, rel=1e-9 if precision == "fp64" else 1e-4)


def assert_drawn_once(folder, name, ranks):
    """Each sample's noise is drawn on one rank alone, differs from the others', and all ranks agree on exit steps."""
    found = [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)]
    steps = []
    for each in zip(*found, strict=True):
        noise = {}
        for rank in each:
            assert not noise.keys() & rank["noise"].keys()
            noise |= rank["noise"]
            assert set(rank["exits"]) == set(each[0]["exits"])
        assert len({tensor.sum().item() for tensor in noise.values()}) == len(noise)
        steps.append(noise)
    return steps


def test_two_ranks_equal_one(tiny, launch):
    common = ("precision=fp64", *BATCH, "batch.global=4", "latents.frames=3", "ema.generator.start=1")
    jobs = {name: (tiny(), (*common, *POLICIES[name]), 2) for name in ("fsdp", "mixed", "replay")}
    folder = launch(2, jobs)
    one = torch.load(launch(1, {"one": jobs["fsdp"]}) / "one.pt")
    for name in jobs:
        assert_equal_to(one, folder, name, "fp64")
        assert_drawn_once(folder, name, 2)


def test_two_ranks_share_rollouts_and_round_alike(tiny, tiny_weights, make_model, launch):
    """Sharded layers round the weights that they gather, whole ones those that they hold: the same."""
    recipe = tiny()
    recipe.write_text(recipe.read_text().replace("dim: 24", "dim: 32").replace(str(tiny_weights), str(recipe.parent)))
    for seed, name in enumerate(("student", "teacher", "critic")):
        save_weights(make_model(torch.float32, seed, text_dim=32, dim=32), recipe.parent / f"{name}.safetensors")
    lowp = ("share_rollout=true", "lowp={linears: fp8, kv_cache: int8}")
    common = ("precision=fp64", *BATCH, "batch.global=4", "ema.generator.start=1", *lowp)
    trained = (*common, "lowp.training=fp8")
    jobs = {name: (recipe, (*trained, *POLICIES[name]), 2) for name in ("fsdp", "ddp")}
    jobs["sequence_2"] = recipe, (*common, *POLICIES["sequence_2"]), 2
    parts = "sequence_2_trained"
    folder = launch(2, jobs | {parts: (recipe, (*trained, *POLICIES["sequence_2"]), 1)})
    single = launch(1, {"one": jobs["fsdp"], "sequence_2": (recipe, common, 2), "first": (recipe, trained, 1)})
    one, two, first = (torch.load(single / f"{name}.pt") for name in ("one", "sequence_2", "first"))
    assert_equal_to(one, folder, "fsdp", "fp64")
    assert_equal_to(one, folder, "ddp", "fp64")
    assert_equal_to(two, folder, "sequence_2", "fp64")
    # Ranks that share a sample round gradients of their parts of the text's keys and values; elsewhere clipping alone differs.
    found = torch.load(folder / f"{parts}.pt")["weights"]
    for role, weights in first["weights"].items():
        other = {name for name, weight in weights.items() if (weight - found[role][name]).abs().max() > 1e-6}
        assert all(name.startswith("text_embedding.") for name in other), role


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_with_step_and_phase(tiny, launch):
    with pytest.raises(AssertionError, match=r"rank 0 .* waited for another rank in step 2, phase 'critic'"):
        launch(2, {"hang_at_1": (tiny(), ("batch.global=2",), 3)})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_four_ranks_equal_one_after_ten_steps(tiny, launch, precision):
    common = (f"precision={precision}", *BATCH)
    recipe = tiny()
    recipe.write_text(recipe.read_text().replace("num_heads: 2", "num_heads: 4"))
    folder = launch(4, {name: (recipe, (*common, *policy), 10) for name, policy in POLICIES.items()})
    one = torch.load(launch(1, {"one": (recipe, common, 10)}) / "one.pt")
    for name in POLICIES:
        assert_equal_to(one, folder, name, precision)


@pytest.mark.slow
def test_no_split_of_a_batch_changes_anything(tiny, launch):
    splits = {world: launch(world, {"split": (tiny(), ("precision=fp64", *BATCH), 3)}) for world in (1, 2, 4, 8)}
    one = torch.load(splits[1] / "split.pt")
    noise = assert_drawn_once(splits[1], "split", 1)
    for world in (2, 4, 8):
        assert_equal_to(one, splits[world], "split", "fp64")
        for mine, theirs in zip(noise, assert_drawn_once(splits[world], "split", world), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[place]) for place, tensor in mine.items())
