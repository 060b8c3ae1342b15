"""The average copies the weights before its start and moves towards them from there on."""

from __future__ import annotations

import torch
from torch import nn

from sftk.runtime.ema import Ema


def value(module):
    return module.weight.item()


def test_start_and_decay():
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay=0.75, start=2)
    found = []
    for step, weight in enumerate((1.0, 2.0, 4.0, 8.0)):
        nn.init.constant_(model.weight, weight)
        ema.update(step)
        found.append(value(ema.module))
    assert found == [1.0, 2.0, 2.5, 3.875]


def test_the_average_is_a_model_of_its_own():
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.5)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = [parameter.clone() for parameter in ema.module.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, ema.module.parameters(), strict=True))
    ema.update(0)
    assert all(torch.allclose(old + 0.5, new) for old, new in zip(before, ema.module.parameters(), strict=True))
