"""What is wrapped around blocks changes neither names nor values."""

from __future__ import annotations

import copy

import pytest
import torch

from sftk.runtime.parallelize import RECOMPILE_LIMIT, limit_recompiles, parallelize


def call(model):
    randn = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 4, 4, generator=randn, dtype=torch.float64)
    embeds = torch.randn(2, 4, 8, generator=randn, dtype=torch.float64)
    flow, _, _ = model(latents, torch.full((2, 3), 500.0, dtype=torch.float64), embeds)
    flow.square().sum().backward()
    return flow.detach(), {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}


@pytest.fixture
def dynamo():
    import torch._dynamo

    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(config, name) for name in names}
    torch._dynamo.reset()
    yield config
    for name, value in before.items():
        setattr(config, name, value)
    torch._dynamo.reset()


def test_checkpointing_keeps_names_values_and_gradients(make_model):
    plain = make_model()
    wrapped = parallelize(copy.deepcopy(plain), checkpoint="full")
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    (flow, gradients), (same, recomputed) = call(plain), call(wrapped)
    assert torch.equal(flow, same)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients if gradients[name] is not None)
    assert sum(gradient is not None for gradient in gradients.values()) > 20


def test_checkpointing_recomputes(make_model):
    model, calls = make_model(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    call(parallelize(model, checkpoint="full"))
    assert len(calls) == 2


def test_checkpointed_blocks_compile(make_model, dynamo):
    plain = make_model()
    wrapped = parallelize(copy.deepcopy(plain), checkpoint="full")
    for block in wrapped.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    (flow, gradients), (same, recomputed) = call(plain), call(wrapped)
    torch.testing.assert_close(same, flow, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-9, atol=1e-12)


def test_plain_is_left_alone(make_model):
    model = make_model()
    before = list(model.blocks)
    assert parallelize(model) is model
    assert all(one is other for one, other in zip(before, model.blocks, strict=True))


def test_the_recompile_limit_is_an_error(dynamo):
    limit_recompiles()
    assert dynamo.recompile_limit >= RECOMPILE_LIMIT
    assert dynamo.fail_on_recompile_limit_hit
    dynamo.recompile_limit = 2

    @torch.compile(backend="eager", dynamic=False)
    def double(value):
        return value * 2

    with pytest.raises(Exception, match="recompile_limit"):
        for size in range(2, 8):
            double(torch.ones(size))
