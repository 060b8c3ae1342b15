"""What of a recipe does not go with a number of ranks is said before anything starts."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.errors import SpecError
from sftk.spec.rank_checks import check_ranks
from sftk.spec.recipe import load_recipe

EXACT = "phases.discriminator.with.penalty=exact"


def stage(*overrides):
    return load_recipe("recipes/digits/gan.yaml", overrides)[0]


def test_second_derivatives_need_whole_weights():
    with pytest.raises(SpecError) as caught:
        check_ranks(stage(EXACT), 2, 2)
    messages = [str(problem) for problem in caught.value.problems]
    assert len(messages) == 2
    assert "'gradient_penalty' differentiates 'fake_score' twice" in messages[0]
    assert "set models.fake_score.parallel: {shard: 1, offload: false}" in messages[0]
    assert "@ $.phases[1].graph (recipes/digits/gan.yaml:" in messages[0]
    whole = [f"models.{role}.parallel.shard=1" for role in ("fake_score", "discriminator")]
    assert check_ranks(stage(EXACT, *whole), 2, 2).shards == {"generator": 2, "fake_score": 1, "discriminator": 1}
    assert check_ranks(stage(), 2, 2).shards["fake_score"] == 2
    assert check_ranks(stage(EXACT), 1, 1).ranks == 1


def test_offloaded_weights_are_not_whole_even_on_one_rank():
    with pytest.raises(SpecError, match="'fake_score' twice"):
        check_ranks(stage(EXACT, "models.fake_score.parallel.offload=true"), 1, 1)


def test_the_check_command_knows_ranks():
    arguments = ["check", "recipes/wan-14b/dmd.yaml", "parallel.sequence=2", "models.generator.parallel.shard=node"]
    result = CliRunner().invoke(main, [*arguments, "--ranks", "16", "--node", "8"])
    assert result.exit_code == 0, result.output
    split = "16 ranks: 1 sample in a pass, 8 passes an update, 2 ranks share each sample"
    assert f"{split}; weights: generator over 8, real_score over 16" in result.output
    result = CliRunner().invoke(main, [*arguments, "--ranks", "6", "--node", "4"])
    assert result.exit_code == 2
    assert "global 64 does not split into passes of 1 on each of 3 ranks @ $.batch" in result.output
    assert "shard 4 does not divide 6 ranks @ $.models.generator.parallel.shard (" in result.output
