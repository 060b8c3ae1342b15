"""Learning rates, clipping, and an update that a gradient that is not finite leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sftk.runtime.optim import apply_gradients, learning_rate, make_optimizer
from sftk.spec.schema import OptimizerSection


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
    norm = apply_gradients(make_optimizer([one], section), torch.tensor(2.0), clip=None)
    clipped = apply_gradients(make_optimizer([two], section), torch.tensor(2.0), clip=1.0)
    assert norm.item() == clipped.item() == 5.0
    torch.testing.assert_close(one.detach(), reference([3.0, 4.0], eps=1.0, weight_decay=0.0))
    torch.testing.assert_close(two.detach(), reference([0.6, 0.8], eps=1.0, weight_decay=0.0))
    assert one.grad is None


def test_a_small_gradient_is_not_scaled_up():
    made = parameter([0.3, 0.4])
    apply_gradients(make_optimizer([made], OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0)), torch.tensor(1.0), clip=1.0)
    torch.testing.assert_close(made.detach(), reference([0.3, 0.4], eps=1.0, weight_decay=0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    made = parameter([1.0, bad])
    optimizer = make_optimizer([made], OptimizerSection(lr=0.1))
    norm = apply_gradients(optimizer, torch.tensor(1.0), clip=1.0)
    assert not math.isfinite(norm.item())
    assert made.tolist() == [0.0, 0.0]
    made.grad = torch.ones(2)
    apply_gradients(optimizer, torch.tensor(1.0), clip=None)
    torch.testing.assert_close(made.detach(), reference([1.0, 1.0]))
