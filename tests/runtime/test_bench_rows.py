"""Rows, means, cycles, floors and comparisons: arithmetic on given numbers."""

from __future__ import annotations

import pytest

from sftk.runtime.bench_measure import Measurement
from sftk.runtime.bench_report import comparison, report_lines
from sftk.runtime.bench_rows import failed_row, floor_seconds, measured_row, summary_rows
from sftk.runtime.plan_rates import gpu, known_gpu
from sftk.runtime.plan_trace import Work

WORK = Work(gemm=680e12, attention=1300e12, attention_backward=620e12, attention_again=650e12)


def measurement(*seconds, allocated=None):
    memory = {"held": allocated, "allocated": allocated, "reserved": allocated}
    return Measurement(seconds=seconds, host_seconds=0.1, warmup_seconds=3.0, graphs=0, compiling=False, **memory)


def row(case, exit_step, *seconds, **changes):
    return measured_row(case, exit_step, measurement(*seconds, **changes), WORK, gpu("h100"), "bf16")


def test_the_floor_has_attention_once():
    assert floor_seconds(WORK, gpu("h100"), "bf16") == pytest.approx(1 + 1 + 1)
    assert floor_seconds(WORK, gpu("h100"), "tf32") == pytest.approx(6)


def test_rates_and_shares():
    found = row("p", 0, 5.0, 6.0, 9.0)
    assert (found["seconds"], found["low"], found["high"], found["repeats"]) == (6.0, 5.0, 9.0, 3)
    assert found["tflop"] == 2600
    assert found["tflop_once"] == 1950
    assert found["tflops"] == pytest.approx(2600 / 6)
    assert found["floor_share"] == pytest.approx(0.5)


def test_devices_that_nobody_knows_have_no_floor():
    found = measured_row("p", None, measurement(2.0), WORK, None, "fp32")
    assert found["floor_seconds"] is None
    assert found["floor_share"] is None
    assert known_gpu("NVIDIA GeForce RTX 4090") == "4090"
    assert known_gpu("NVIDIA A100-SXM4-80GB") == "a100"
    assert known_gpu("NVIDIA T4") is None


def test_a_cycle_is_the_sum_of_its_phases_means():
    rows = [row("g", 1, 8.0, allocated=7), row("g", 0, 6.0, allocated=9), row("c", None, 2.0, allocated=3)]
    mean, cycle = summary_rows(rows, {"g": [0, 1], "c": [None]}, {"g": 1, "c": 5})
    assert (mean["case"], mean["exit_step"], mean["seconds"], mean["allocated"]) == ("g", "mean", 7.0, 9)
    assert (cycle["case"], cycle["seconds"], cycle["tflop"]) == ("cycle", 17.0, 6 * 2600)
    assert cycle["floor_share"] == pytest.approx(18 / 17)
    assert cycle["runs"] == {"g": 1, "c": 5}


def test_what_was_not_measured_whole_has_no_mean():
    failed = failed_row("g", 0, "OutOfMemoryError: too much")
    assert summary_rows([row("g", 1, 8.0), failed], {"g": [0, 1]}, {"g": 1}) == []
    assert summary_rows([row("c", None, 1.0)], {"g": [0, 1], "c": [None]}, {"g": 1, "c": 5}) == []


def test_differences_within_the_spread_are_not_marked():
    before = row("p", 0, 1.8, 2.0, 2.2)
    assert comparison(row("p", 0, 2.2), before) == "2, +10.0%"
    assert comparison(row("p", 0, 2.3), before) == "2, +15.0% SLOWER"
    assert comparison(row("p", 0, 2.3), None) == "-"
    assert comparison(row("p", 0, 2.3), failed_row("p", 0, "x")) == "-"


def report(*rows, name="one"):
    variant = {
        "name": name,
        "recipe": "dmd",
        "latents": {"frames": 21, "channels": 16, "height": 60, "width": 104},
        "batch": {"per_pass": 1, "passes": 2},
        "precision": "bf16",
        "compiled": True,
        "models": {"g": {"dtype": "fp32", "checkpoint": "full", "backend": "auto"}},
        "rows": list(rows),
    }
    versions = {"driver": "580.1", "cuda": "13.0", "torch": "2.11"}
    auto = {"full": {"forward": "sdpa_cudnn", "training": "sdpa"}}
    device = {"type": "cuda", "name": "NVIDIA H100", **versions, "attention": ["sdpa"], "auto": auto}
    return {"device": device, "variants": [variant]}


def test_a_report_shows_rows_failures_and_what_got_worse():
    now = report(row("g", 3, 4.0, allocated=3 << 30), failed_row("c", None, "OutOfMemoryError: 80 GiB"))
    lines = list(report_lines(now, report(row("g", 3, 2.0, allocated=2 << 30), name="other")))
    assert lines[0] == "NVIDIA H100; driver 580.1, cuda 13.0, torch 2.11; attention sdpa; auto is sdpa_cudnn and sdpa"
    assert lines[2].startswith("one: latents 21 x 16 x 60 x 104, batch 2 x 1, bf16, compiled, attention/checkpoint auto/full")
    assert " ".join(lines[3].split()) == "case seconds low - high n host TFLOP TFLOP/s floor of it GiB reserved before"
    assert lines[4].endswith("2, +100.0% SLOWER, +50% MORE MEMORY")
    assert lines[4].split()[:2] == ["g", "3"]
    assert lines[5] == "  c     failed: OutOfMemoryError: 80 GiB"


def test_columns_that_are_empty_everywhere_are_left_out():
    found = measured_row("steps", None, measurement(1.0), None, None, "fp32")
    lines = list(report_lines(report(found)))
    assert lines[3].split() == ["case", "seconds", "low", "-", "high", "n", "host"]
