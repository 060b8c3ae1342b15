"""Ranks arranged as a recipe says: who shares weights, who shares samples, how a batch splits."""

from __future__ import annotations

import pytest

from sftk.errors import SpecError
from sftk.spec.arrangement import arrange_ranks
from sftk.spec.recipe import load_recipe


def arranged(ranks, node, *overrides):
    return arrange_ranks(load_recipe("recipes/wan-14b/dmd.yaml", overrides)[0].recipe, ranks, node)


def test_weights_and_samples_are_arranged_independently():
    found = arranged(64, 8, "parallel.shard=node", "parallel.sequence=4", "models.real_score.parallel.shard=all")
    assert found.shards == {"generator": 8, "real_score": 64, "fake_score": 8}
    assert (found.data, found.per_rank, found.accumulation) == (16, 1, 4)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_batch_splits_over_ranks_and_accumulation(ranks):
    found = arranged(ranks, 8, "batch.global=8")
    assert (found.per_rank, found.accumulation * ranks) == (1, 8)
    whole = arranged(ranks, 8, "batch.global=8", "batch.per_rank=null")
    assert (whole.per_rank * ranks, whole.accumulation) == (8, 1)


def test_every_reason_is_reported_with_its_path():
    with pytest.raises(SpecError) as caught:
        arranged(6, 6, "parallel.sequence=4", "models.generator.parallel.shard=5", "batch.global=7")
    assert [problem.path for problem in caught.value.problems] == [
        ("parallel", "sequence"),
        ("models", "generator", "parallel", "shard"),
    ]
    with pytest.raises(SpecError, match="global 64 does not split into passes of 1 on each of 3 ranks"):
        arranged(3, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.sequence=5", "sequence 5 does not divide 12 attention heads; take one of 1, 2, 3, 4, 6, 12 .'generator'"),
        ("latents.height=2 latents.width=4 parallel.sequence=4", "sequence 4 is more than the 2 tokens of a frame"),
        ("parallel.shard=0", "shard must be at least 1, found 0"),
        ("parallel.shard=nodes", "found"),
        ("models.generator.parallel.shards=2", "unknown key 'shards'"),
        ("models.generator.parallel.shard=2.5", "found"),
    ],
)
def test_a_wrong_section_is_found_by_the_check(override, message):
    with pytest.raises(SpecError, match=message):
        load_recipe("recipes/wan-14b/dmd.yaml", override.split())
