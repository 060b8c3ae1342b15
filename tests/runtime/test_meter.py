"""Metrics are read at once on a CPU, one step late on a GPU, each once."""

from __future__ import annotations

import math

import pytest
import torch

from sftk.runtime.meter import Meter, first_nonfinite


def put(meter, steps):
    return [meter.put(step, {"a/loss": torch.tensor(float(step)), "a/grad_norm": torch.tensor([2.0])}) for step in range(steps)]


def test_on_a_cpu_nothing_waits():
    meter = Meter(torch.device("cpu"))
    assert put(meter, 2) == [[(0, {"a/loss": 0.0, "a/grad_norm": 2.0})], [(1, {"a/loss": 1.0, "a/grad_norm": 2.0})]]
    assert meter.flush() == []


def test_on_a_gpu_one_step_late():
    meter = Meter(torch.device("cuda"))
    assert [[step for step, _ in ready] for ready in put(meter, 3)] == [[], [0], [1]]
    assert [step for step, _ in meter.flush()] == [2]
    assert meter.flush() == []


def test_a_step_without_metrics():
    assert Meter(torch.device("cpu")).put(4, {}) == [(4, {})]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_that_is_not_finite(bad):
    assert first_nonfinite({"a/loss": 1.0, "b/loss": bad, "c/loss": math.nan}) == "b/loss"
    assert first_nonfinite({"a/loss": 1.0}) is None
