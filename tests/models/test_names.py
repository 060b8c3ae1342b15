"""Names between the original Wan and diffusers."""

from __future__ import annotations

import pytest
import torch

from sftk.models import WanConfig, WanModel, preset
from sftk.models.names import rename, unwrap


def test_the_table_is_a_bijection_on_every_parameter():
    with torch.device("meta"):
        names = list(WanModel(preset("14b")).state_dict())
    theirs = [rename(name, "diffusers") for name in names]
    assert len(set(theirs)) == len(names) == 1095
    assert [rename(name, "original") for name in theirs] == names
    assert sum(a == b for a, b in zip(names, theirs, strict=True)) == 2  # patch_embedding alone is called the same


def test_names_are_those_of_diffusers():
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    with torch.device("meta"):
        theirs = transformer.WanTransformer3DModel(num_layers=2).state_dict()
        ours = WanModel(WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=2)).state_dict()
    assert {rename(name, "diffusers"): tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.blocks.0.ffn.0.bias", "blocks.0.ffn.0.bias"),
        ("model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.modulation", "blocks.0.modulation"),
        ("_fsdp_wrapped_module.model.blocks.1._checkpoint_wrapped_module.ffn.0.bias", "blocks.1.ffn.0.bias"),
        ("_orig_mod.model.head.head.weight", "head.head.weight"),
        ("module.model.head.modulation", "head.modulation"),
        ("head.modulation", "head.modulation"),
    ],
)
def test_unwrap(name, wanted):
    assert unwrap(name) == wanted
