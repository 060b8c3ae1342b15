"""Learning rates, clipping, and an update that a gradient that is not finite leaves out."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from sftk.errors import SftkError, SpecError
from sftk.runtime.optim import apply_gradients, learning_rate, make_optimizer, set_learning_rate
from sftk.runtime.optim_8bit import plain_state, quantized_states
from sftk.spec.optimizer import OptimizerGroup, OptimizerSection


def rates(steps=10, **options):
    section = OptimizerSection(lr=2.0, **options)
    return [learning_rate(section, step, steps) for step in range(steps)]


def test_constant_with_warmup():
    assert rates(steps=5, warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates(steps=3) == [2.0] * 3


def test_linear_decay_from_a_share_of_the_steps_to_a_share_of_the_rate():
    found = rates(schedule="linear", decay_from=0.5, final=0.2)
    assert found == pytest.approx([2.0] * 6 + [1.68, 1.36, 1.04, 0.72])
    assert learning_rate(OptimizerSection(lr=2.0, schedule="linear", final=0.2), 10, 10) == pytest.approx(0.4)


def test_cosine_decay():
    found = rates(steps=4, schedule="cosine")
    assert found == pytest.approx([1 + math.cos(math.pi * share) for share in (0.0, 0.25, 0.5, 0.75)])
    assert rates(steps=4, schedule="cosine", final=1.0) == [2.0] * 4


def test_warmup_and_decay_multiply():
    assert rates(steps=4, schedule="linear", warmup=4) == pytest.approx([0.5, 0.75, 0.75, 0.5])


def test_decay_from_the_end_never_begins():
    assert rates(schedule="linear", decay_from=1.0) == [2.0] * 10


def parameter(gradient):
    made = nn.Parameter(torch.zeros(len(gradient)))
    made.grad = torch.tensor(gradient)
    return made


def reference(gradient, **options):
    made = parameter(gradient)
    optimizer = torch.optim.AdamW([made], lr=0.1, fused=False, **options)
    optimizer.step()
    return made.detach()


def test_gradients_are_divided_by_their_weight_and_clipped():
    one, two = parameter([6.0, 8.0]), parameter([6.0, 8.0])
    section = OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0)
    norm = apply_gradients(make_optimizer({"p": one}, section), torch.tensor(2.0), clip=None)
    clipped = apply_gradients(make_optimizer({"p": two}, section), torch.tensor(2.0), clip=1.0)
    assert norm.item() == clipped.item() == 5.0
    torch.testing.assert_close(one.detach(), reference([3.0, 4.0], eps=1.0, weight_decay=0.0))
    torch.testing.assert_close(two.detach(), reference([0.6, 0.8], eps=1.0, weight_decay=0.0))
    assert one.grad is None


def test_a_small_gradient_is_not_scaled_up():
    made = parameter([0.3, 0.4])
    apply_gradients(
        make_optimizer({"p": made}, OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0)), torch.tensor(1.0), clip=1.0
    )
    torch.testing.assert_close(made.detach(), reference([0.3, 0.4], eps=1.0, weight_decay=0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    made = parameter([1.0, bad])
    optimizer = make_optimizer({"p": made}, OptimizerSection(lr=0.1))
    norm = apply_gradients(optimizer, torch.tensor(1.0), clip=1.0)
    assert not math.isfinite(norm.item())
    assert made.tolist() == [0.0, 0.0]
    made.grad = torch.ones(2)
    apply_gradients(optimizer, torch.tensor(1.0), clip=None)
    torch.testing.assert_close(made.detach(), reference([1.0, 1.0]))


def test_groups_have_their_own_decay_and_rate():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = (
        OptimizerGroup(match=("*.bias", "1.*"), weight_decay=0.0),
        OptimizerGroup(match=("0.weight",), lr_scale=0.5),
    )
    optimizer = make_optimizer(dict(model.named_parameters()), OptimizerSection(lr=1.0, weight_decay=0.1, groups=groups))
    set_learning_rate(optimizer, 0.2)
    found = [(len(group["params"]), group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    assert found == [(3, 0.0, 0.2), (1, 0.1, 0.1)]  # nothing is left for the rest
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    apply_gradients(optimizer, torch.tensor(1.0), clip=None)
    torch.testing.assert_close(model[0].weight.detach(), before["0.weight"] * (1 - 0.1 * 0.1))
    assert torch.equal(model[1].weight, before["1.weight"])


def test_a_group_that_matches_nothing_is_an_error():
    groups = (OptimizerGroup(match=("*",)), OptimizerGroup(match=("bias",)))
    with pytest.raises(SpecError, match=r"group \['bias'\] matches no parameter, or none .*; names are such as weight, bias"):
        make_optimizer(dict(nn.Linear(1, 1).named_parameters()), OptimizerSection(lr=1.0, groups=groups))


def test_without_torchao_the_8_bit_optimizer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(SftkError, match=r"pip install 'sftk\[lowp\]'"):
        make_optimizer({"p": nn.Parameter(torch.ones(1))}, OptimizerSection(lr=1.0, use="adamw_8bit"))


def eight_bit(steps=0):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = make_optimizer({"w": weight}, OptimizerSection(lr=1e-2, use="adamw_8bit"))
    for step in range(steps):
        give_gradient(weight, step)
        assert apply_gradients(optimizer, torch.tensor(2.0), clip=1.0) > 1.0
    return weight, optimizer


def give_gradient(weight, step):
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)) * 2


def test_8_bit_states_follow_the_whole_ones_and_survive_a_checkpoint():
    pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        weight, optimizer = eight_bit(steps=4)
        torch.manual_seed(0)
        whole = nn.Parameter(torch.randn(64, 64))
        reference = make_optimizer({"w": whole}, OptimizerSection(lr=1e-2))
        for step in range(4):
            give_gradient(whole, step)
            apply_gradients(reference, torch.tensor(2.0), clip=1.0)
        moved = (whole - eight_bit()[0]).norm()
        assert (weight - whole).norm() < 0.05 * moved
        again, restored = eight_bit()
        again.data.copy_(weight.detach())
        saved = {name: plain_state(value) for name, value in optimizer.state[weight].items()}
        assert {type(value) for value in saved.values()} == {torch.Tensor}
        restored.state.update(quantized_states(restored, {again: {name: value.clone() for name, value in saved.items()}}))
        for step in (4, 5):
            for parameter, each in ((weight, optimizer), (again, restored)):
                give_gradient(parameter, step)
                apply_gradients(each, torch.tensor(2.0), clip=1.0)
        torch.testing.assert_close(weight, again, rtol=0, atol=1e-6)
        for name, value in optimizer.state[weight].items():
            if name != "step":
                assert torch.equal(value.codes, restored.state[again][name].codes)
