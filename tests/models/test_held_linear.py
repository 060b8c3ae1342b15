"""Weights that are held in bfloat16 give autocast's own numbers, follow every change, and appear nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sftk.models.held_linear import HalfLinear, hold_linears
from sftk.runtime.optim import make_optimizer
from sftk.runtime.parallelize import parallelize
from sftk.spec.optimizer import OptimizerSection


def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 4, 4, generator=generator)
    return latents, torch.full((2, 3), 500.0), torch.randn(2, 4, 8, generator=generator)


def flow(model, grad=False):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        return model(*inputs())[0]


@pytest.fixture
def models(make_model):
    plain = make_model(torch.float32)
    return plain, hold_linears(copy.deepcopy(plain), HalfLinear)


def test_numbers_are_autocasts_own(models):
    plain, held = models
    assert torch.equal(flow(held), flow(plain))
    assert torch.equal(flow(held, grad=True), flow(plain, grad=True))
    assert sum(layer.held is not None for layer in held.modules() if isinstance(layer, HalfLinear)) == 20
    with torch.no_grad():
        assert torch.equal(held(*inputs())[0], plain(*inputs())[0])  # without autocast it is float32


def test_names_and_gradients_stay(models):
    plain, held = models
    assert list(held.state_dict()) == list(plain.state_dict())
    for model in models:
        flow(model, grad=True).square().sum().backward()
    for ours, theirs in zip(held.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or theirs.grad is None or torch.equal(ours.grad, theirs.grad)


def test_a_step_of_the_optimiser_is_followed(models):
    plain, held = models
    before = flow(held)
    for model in models:
        optimizer = make_optimizer(dict(model.state_dict(keep_vars=True)), OptimizerSection(lr=1e-2))
        flow(model, grad=True).square().sum().backward()
        optimizer.step()
    assert torch.equal(flow(held), flow(plain))
    assert not torch.equal(flow(held), before)


def test_weights_that_are_swapped_in_are_followed(models):
    plain, held = models
    flow(held)
    kept = next(layer for layer in held.modules() if isinstance(layer, HalfLinear)).held[0]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.mul_(0.5)
    assert torch.equal(flow(held), flow(plain))
    assert next(layer for layer in held.modules() if isinstance(layer, HalfLinear)).held[0] is kept  # in place


@pytest.mark.parametrize("checkpoint", ["none", "selective", "products"])
def test_blocks_compile(models, checkpoint):
    torch._dynamo.reset()
    plain, held = models
    parallelize(held, checkpoint=checkpoint)
    for block in held.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for grad in (False, True):
        torch.testing.assert_close(flow(held, grad), flow(plain, grad))


def test_layers_of_another_kind_are_left_alone():
    class Other(nn.Linear):
        pass

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), Other(4, 4))])
    hold_linears(model, HalfLinear)
    assert [type(layer) for layer in model.blocks[0]] == [HalfLinear, Other]
