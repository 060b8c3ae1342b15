"""The first thing that is not finite: an input, a weight, a key."""

from __future__ import annotations

import torch

from sftk.core.graph import Graph
from sftk.core.transform import transform
from sftk.functional import add_noise, flow_target
from sftk.runtime.port import Port
from sftk.runtime.probe import find_nonfinite


def values(**changes):
    ones = torch.ones(1, 3, 4, 2, 2)
    return {"x0": ones, "noise": ones, "timestep": torch.full((1, 3), 500.0), "blocks": (1, 2)} | changes


def test_inputs_then_weights_then_keys(make_model, nothing_stays_registered):
    @transform(out="divided", kind="per_sample")
    def divide_for_probe(noisy):
        return noisy / 0.0, 1.0

    @transform(out="called", kind="per_sample", models=("denoiser",))
    def call_for_probe(target, denoiser):
        return target

    graph = Graph([add_noise, flow_target, divide_for_probe, call_for_probe], inputs=("x0", "noise", "timestep"))
    models = {"denoiser": Port(make_model(), None)}
    assert find_nonfinite(graph, values(noise=torch.full((1, 3, 4, 2, 2), torch.nan)), models) == "the input 'noise'"
    assert find_nonfinite(graph, values(), models) == "'divided', written by 'divide_for_probe'"
    with torch.no_grad():
        next(models["denoiser"].module.parameters()).fill_(torch.inf)
    found = find_nonfinite(graph, values(), models)
    assert found is not None
    assert found.startswith("the weight 'patch_embedding")
    assert found.endswith("of 'denoiser'")


def test_nothing_to_find():
    graph = Graph([add_noise, flow_target], inputs=("x0", "noise", "timestep"))
    assert find_nonfinite(graph, values(flags=torch.tensor([1]), nothing=None), {}) is None
