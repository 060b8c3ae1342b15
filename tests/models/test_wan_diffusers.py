"""The backbone against diffusers' implementation of the same model, with random weights."""

from __future__ import annotations

import re

import pytest
import torch

transformers = pytest.importorskip("diffusers.models.transformers.transformer_wan")

RENAMES = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
)


def original_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def pair(make_model, **changes):
    ours = make_model(torch.float32, **changes).eval()
    config = ours.config
    theirs = transformers.WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=config.cross_attn_norm,
        eps=config.eps,
        rope_max_seq_len=32,
    ).eval()
    weights = ours.state_dict()
    names = {name: original_name(name) for name in theirs.state_dict()}
    assert sorted(names.values()) == sorted(weights)
    theirs.load_state_dict({name: weights[original] for name, original in names.items()})
    return ours, theirs


@pytest.mark.parametrize(
    "changes",
    [{}, {"dim": 36, "num_heads": 3}, {"dim": 64, "num_heads": 2, "num_layers": 3}, {"cross_attn_norm": False}],
    ids=str,
)
@pytest.mark.parametrize("timestep", [[0.0, 1000.0], [937.5, 20.25]])
def test_same_flow_as_diffusers(make_model, randn, changes, timestep):
    ours, theirs = pair(make_model, **changes)
    latents, embeds = randn(2, 3, 4, 6, 8).float(), randn(2, 4, 8).float()
    times = torch.tensor(timestep)
    with torch.no_grad():
        expected = theirs(latents.transpose(1, 2), times, embeds, return_dict=False)[0].transpose(1, 2)
        found = ours(latents, times, embeds)[0]
    assert expected.std() > 0.05
    assert (found - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_same_gradients_as_diffusers(make_model, randn):
    ours, theirs = pair(make_model)
    latents, embeds, times = randn(1, 2, 4, 4, 4).float(), randn(1, 4, 8).float(), torch.tensor([500.0])
    weight = randn(1, 2, 4, 4, 4).float()
    (ours(latents, times, embeds)[0] * weight).sum().backward()
    (theirs(latents.transpose(1, 2), times, embeds, return_dict=False)[0].transpose(1, 2) * weight).sum().backward()
    own = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        found = own[original_name(name)]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
