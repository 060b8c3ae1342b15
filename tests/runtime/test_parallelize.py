"""What is wrapped around blocks changes neither names nor values."""

from __future__ import annotations

import copy
from collections import Counter
from typing import get_args

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from sftk.core import Graph
from sftk.functional import Key
from sftk.functional.attention import attention_operators
from sftk.models.pass_kind import PassKind
from sftk.models.products import product_operators
from sftk.runtime.activations import Checkpoint
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


KINDS = pytest.mark.parametrize("kind", [kind for kind in get_args(Checkpoint) if kind != "none"])


@KINDS
def test_checkpointing_keeps_names_values_and_gradients(make_model, kind):
    plain = make_model()
    wrapped = parallelize(copy.deepcopy(plain), checkpoint=kind)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    (flow, gradients), (same, recomputed) = call(plain), call(wrapped)
    assert torch.equal(flow, same)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients if gradients[name] is not None)
    assert sum(gradient is not None for gradient in gradients.values()) > 20


@KINDS
def test_checkpointing_recomputes(make_model, kind):
    model, calls = make_model(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    call(parallelize(model, checkpoint=kind))
    assert len(calls) == 2


class Operators(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def counted(model, compiled):
    """How often attention, products and roots of RMS norms were computed in a step: in all, or in the graphs of a block."""
    graphs = Counter()

    def count(graph, example):
        for node in graph.graph.nodes:
            # What is computed again is an argument of an operator that sets random numbers back.
            graphs.update({node.target, *(arg for arg in node.args if callable(arg))})
        return make_boxed_func(graph.forward)

    if compiled:
        backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
        for block in model.blocks:
            block.compile(backend=backend)  # one graph serves all blocks
        call(model)
    else:
        with Operators() as found:
            call(model)
        graphs = found.counts
    kinds = (attention_operators(), product_operators(), {torch.ops.aten.rsqrt.default})
    return [sum(graphs[operator] for operator in kind) for kind in kinds]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("kind", "attentions", "products"), [("selective", 1, 9), ("full", 2, 10), ("products", 1, 0)]
)  # self- and cross-attention have four products each, a feed-forward layer two
def test_what_is_computed_again(make_model, dynamo, kind, attentions, products, compiled):
    plain, model = make_model(), parallelize(make_model(), checkpoint=kind)
    times = 1 if compiled else len(model.blocks)
    (attention, product, roots), (again, product_again, roots_again) = counted(plain, compiled), counted(model, compiled)
    assert attention == 2 * times
    assert again == attentions * 2 * times
    assert roots_again == roots + 4 * times
    assert product_again == product + products * times


@KINDS
def test_checkpointed_blocks_compile(make_model, dynamo, kind):
    plain = make_model()
    wrapped = parallelize(copy.deepcopy(plain), checkpoint=kind)
    for block in wrapped.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    (flow, gradients), (same, recomputed) = call(plain), call(wrapped)
    torch.testing.assert_close(same, flow, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("blocks", [3, 5])
@pytest.mark.parametrize("kind", ["none", "selective"])
def test_a_rollout_of_any_length_has_four_graphs(make_model, dynamo, kind, blocks):
    """The first block's and that of all later ones, whatever their context, with and without gradient."""
    assert graphs_of_a_rollout(make_model(), kind, blocks) == 4


@pytest.mark.parametrize("blocks", [5, 7])
def test_each_further_backend_is_a_graph_at_any_length(make_model, dynamo, monkeypatch, blocks):
    """As on CUDA, where `auto` may take another one for blocks after a long context, without gradient."""

    def late(kind, backend, **fp8):
        return "math" if kind.cached >= 2 * kind.tokens and not torch.is_grad_enabled() else "sdpa"

    monkeypatch.setattr(PassKind, "attention", late)
    assert graphs_of_a_rollout(make_model(), "none", blocks) == 5


def graphs_of_a_rollout(plain, kind, blocks):
    """How many there are with compiled blocks; x0 and gradients are those without."""
    wrapped, graphs = parallelize(copy.deepcopy(plain), checkpoint=kind), []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    for block in wrapped.blocks:
        block.compile(backend=count, fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    given = {
        "noise": torch.randn(1, 3 * blocks, 4, 4, 4, generator=generator, dtype=torch.float64),
        "prompt_embeds": torch.randn(1, 4, 8, generator=generator, dtype=torch.float64),
        "key": Key(seed=0, samples=(0,)),
    }
    found = []
    for model in (plain, wrapped):
        x0 = Graph.from_spec("specs/rollout.yaml", steps=[1000, 500, 250])(given, {"denoiser": model})["x0"]
        x0.square().sum().backward()
        found.append((x0.detach(), model.get_parameter("head.head.weight").grad))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact)
    return len(graphs)


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
