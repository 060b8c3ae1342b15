"""Sequence parallelism, in real processes: what several ranks compute together is what one computes alone."""

from __future__ import annotations

import pytest
import torch
from sequence_cases import CASES, HEADS, assert_equal, config, launch, run_alone

from sftk.errors import SpecError
from sftk.functional import KVCache
from sftk.functional.exchange import one_rank
from sftk.models import WanModel
from sftk.runtime.sequence import SequenceGroup, share_sequence

QUICK = ("bidirectional", "rollout_sink", "dmd", "discriminator")


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    """A folder of what every rank found in the cases that are wanted."""
    mine = [item for item in request.session.items if item.path == request.path and "found" in item.fixturenames]
    degrees, names = (sorted({item.callspec.params[each] for item in mine}) for each in ("degree", "name"))
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, degrees, names)
    return folder


def quick(value, of):
    return value if value in of else pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [quick(name, QUICK) for name in CASES])
@pytest.mark.parametrize("degree", [quick(degree, (2, 3)) for degree in HEADS])
def test_ranks_together_equal_one_alone(found, name, degree):
    assert_equal(torch.load(found / f"{name}_{degree}.pt"), run_alone(name, degree))


@pytest.mark.parametrize(("degree", "fits"), [(2, "1, 3"), (4, "1, 3")])
def test_a_degree_that_does_not_divide_the_heads(make_model, degree, fits):
    model = make_model(num_heads=3)
    with pytest.raises(SpecError, match=f"sequence {degree} does not divide 3 attention heads; take one of {fits}"):
        share_sequence(model, SequenceGroup(name="", rank=0, degree=degree))


def test_one_rank_leaves_a_model_alone(make_model):
    model = make_model()
    assert share_sequence(model, SequenceGroup(name="", rank=0, degree=1)).exchange is one_rank


def test_on_meta_tensors_shapes_are_local():
    with torch.device("meta"):
        model = WanModel(config(4))
        share_sequence(model, SequenceGroup(name="", rank=1, degree=4))
        flow, kv, _ = model(torch.empty(1, 3, 4, 6, 6), torch.empty(1, 3), torch.empty(1, 4, 8), cache=KVCache())
    flow.sum().backward()
    assert flow.shape == (1, 3, 4, 6, 6)
    assert kv[0][0].shape == kv[0][1].shape == (1, 3 * 9, 1, 8)
