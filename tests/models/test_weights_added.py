"""Checkpoints from before a model had a further part."""

from __future__ import annotations

import attrs
import pytest
import torch

from sftk.errors import CheckpointError
from sftk.models.weights import build_model, load_weights, read_config, read_tensors, save_weights

CPU = torch.device("cpu")


def test_a_checkpoint_without_the_part_leaves_it_at_its_start(make_model, randn, tmp_path):
    plain = make_model(torch.float32)
    save_weights(plain, tmp_path / "plain.safetensors")
    config = attrs.evolve(plain.config, interval_embedding=True)
    state = torch.get_rng_state()
    built = [
        build_model(config, weights=tmp_path / "plain.safetensors", seed=seed, dtype="fp32", backend="auto", device=CPU)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    x, t, embeds = randn(1, 3, 4, 4, 4).float(), torch.full((1, 3), 500.0), randn(1, 4, 8).float()
    assert torch.equal(built[0](x, t, embeds, interval=t)[0], plain(x, t, embeds)[0])
    first = [model.interval_embedding[0].weight for model in built]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert 0.01 < first[0].std() < 0.03


def test_a_checkpoint_with_the_part_gives_it_and_a_torn_one_is_refused(make_model, tmp_path):
    model, other = make_model(torch.float32, interval_embedding=True), make_model(torch.float32, 1, interval_embedding=True)
    save_weights(model, tmp_path / "whole.safetensors")
    load_weights(other, tmp_path / "whole.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert read_config(tmp_path / "whole.safetensors") == model.config
    del model.interval_embedding[2].bias
    save_weights(model, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: interval_embedding.2.bias \[24\]"):
        load_weights(other, tmp_path / "torn.safetensors")


def test_a_model_without_the_part_refuses_a_checkpoint_that_has_it(make_model, tmp_path):
    save_weights(make_model(interval_embedding=True), tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: interval_embedding"):
        load_weights(make_model(), tmp_path / "more.safetensors")
    assert "interval_embedding.0.weight" in read_tensors(tmp_path / "more.safetensors")
