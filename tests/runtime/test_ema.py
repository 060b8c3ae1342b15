"""The average begins at its start as the weights and moves towards them from there on; it is swapped in to be evaluated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sftk.runtime.ema import Ema


def test_start_and_decay():
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay=0.75, start=2)
    found, begun = [], []
    for step, weight in enumerate((1.0, 2.0, 4.0, 8.0)):
        nn.init.constant_(model.weight, weight)
        ema.update(step)
        found.append(ema.state_dict()["weight"].item())
        begun.append(ema.begun)
    assert found == [1.0, 2.0, 2.5, 3.875]
    assert begun == [False, True, True, True]


@pytest.mark.parametrize("separate", [False, True])
def test_it_has_tensors_of_its_own(separate):
    model = nn.Linear(2, 2)
    module = nn.Linear(2, 2).requires_grad_(False)
    module.load_state_dict(model.state_dict())
    ema = Ema(model, decay=0.5, module=module if separate else None)
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in ema.state_dict().items())
    ema.update(0)
    for name, tensor in ema.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 0.5)
        assert not tensor.requires_grad
    torch.testing.assert_close(module.weight.detach(), before["weight"] + (0.5 if separate else 0.0))


def test_swapped_in_and_back_bit_by_bit():
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.3)
    weights = {name: tensor.add_(torch.rand_like(tensor)).clone() for name, tensor in model.state_dict().items()}
    ema.update(0)
    average = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    with pytest.raises(ValueError, match="in the middle"), ema.swapped():
        assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
        raise ValueError("in the middle")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in ema.state_dict().items())


def test_before_its_start_it_is_the_weights():
    model = nn.Linear(1, 1)
    ema = Ema(model, decay=0.5, start=9)
    with ema.swapped():
        assert ema.state_dict()["weight"].data_ptr() == model.weight.data_ptr()
    ema.begin()
    assert ema.state_dict()["weight"].data_ptr() != model.weight.data_ptr()
