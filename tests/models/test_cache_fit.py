"""A cache of another batch, frame size or model than the pass that reads it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sftk.errors import ShapeError
from sftk.functional import KVCache, append, forget_text, window
from sftk.functional.cache import take_rows
from sftk.models import WanModel
from sftk.runtime.sequence import SequenceGroup, share_sequence

MODEL = "a cache serves only the model that filled it, with as many ranks to a sample"
BATCH = "begin a new KVCache, or take_rows of it"
SIZE = "a cache serves latents of one height and width; begin others with a new KVCache"


def passed(model, batch=2, frames=3, height=4, width=6, cache=None, grad=False):
    dtype = model.patch_embedding.weight.dtype
    given = torch.zeros(batch, frames, 4, height, width, dtype=dtype), torch.zeros(batch, frames, dtype=dtype)
    with torch.set_grad_enabled(grad):
        return model(*given, torch.zeros(batch, 4, 8, dtype=dtype), cache=KVCache() if cache is None else cache)


def filled(model, **cache):
    """Two chunks, of two frames and of one."""
    first = append(KVCache(**cache), passed(model, frames=2)[1], (0, 1))
    return append(first, passed(model, frames=1, cache=first)[1], (2,))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cache", [{}, {"reserve": 9}, {"storage": "int8"}, {"rope": "relative"}], ids=str)
@pytest.mark.parametrize(
    ("other", "given", "message"),
    [
        ({}, {"batch": 1}, f"the cache holds keys of 2 samples, the latents are of 1; {BATCH}"),
        ({}, {"height": 6}, f"the cache holds keys of 6 tokens a frame, the latents have 9; {SIZE}"),
        (
            {"num_heads": 3},
            {},
            f"the cache holds keys of 2 heads of 12 channels, the model has 3 heads of 8 channels here; {MODEL}",
        ),
        ({"num_layers": 1}, {}, f"the cache holds keys of 2 layers, the model has 1; {MODEL}"),
        ({"num_layers": 3}, {}, f"the cache holds keys of 2 layers, the model has 3; {MODEL}"),
    ],
)
def test_what_was_found_what_was_expected_and_the_fix(make_model, grad, cache, other, given, message):
    held = filled(make_model(), **cache)
    with pytest.raises(ShapeError) as raised:
        passed(make_model(**other), **given, cache=held, grad=grad)
    assert str(raised.value) == message


def test_text_alone_of_another_batch(make_model):
    model = make_model()
    held = dataclasses.replace(filled(model), chunks=())
    with pytest.raises(ShapeError) as raised:
        passed(model, batch=1, cache=held)
    assert str(raised.value) == f"the cache holds text keys of 2 samples, the latents are of 1; {BATCH}"
    passed(model, batch=1, cache=forget_text(held))


def test_caches_that_fit_are_read(make_model):
    model = make_model()
    held = filled(model)
    for batch, cache in ((2, window(held, size=2, sink=1)), (1, take_rows(held, 1, 2)), (2, KVCache())):
        assert passed(model, batch=batch, cache=cache)[0].shape == (batch, 3, 4, 4, 6)


def test_a_rank_that_shares_samples_has_its_heads_alone(make_model):
    with torch.device("meta"):
        alone, shared = (WanModel(make_model().config) for _ in range(2))
        share_sequence(shared, SequenceGroup(name="", rank=1, degree=2))
        assert passed(shared, cache=filled(shared))[0].shape == (2, 3, 4, 4, 6)
        with pytest.raises(ShapeError, match="keys of 2 heads of 12 channels, the model has 1 heads of 12 channels here"):
            passed(shared, cache=filled(alone))
