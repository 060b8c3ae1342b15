"""The backbone against diffusers' implementation of the same model, with random weights."""

from __future__ import annotations

import pytest
import torch

from sftk.models.names import rename

transformers = pytest.importorskip("diffusers.models.transformers.transformer_wan")


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
    names = {name: rename(name, "original") for name in theirs.state_dict()}
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
        found = own[rename(name, "original")]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
