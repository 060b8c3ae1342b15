"""Rows of a benchmark: what was measured beside what was counted, means over exit steps, a whole cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from sftk.runtime.bench_measure import Measurement
from sftk.runtime.plan_layout import SLOWER
from sftk.runtime.plan_rates import Gpu
from sftk.runtime.plan_trace import Work

MEAN = "mean"
"""What stands for the exit step in a row over all of them."""
CYCLE = "cycle"
"""The case that sums up a cycle of phases."""

Row = dict[str, Any]
"""A row as JSON has it; seconds, bytes and TFLOP."""


def floor_seconds(work: Work, gpu: Gpu, precision: str) -> float:
    """Seconds of the matrix work alone at the rates of the GPU's best kernels, no attention computed again for a checkpoint.

    Linear layers are counted as often as the recipe's checkpoints compute them: keeping what they return is a matter of memory.

    Example:
        >>> from sftk.runtime.plan_rates import gpu
        >>> round(floor_seconds(Work(gemm=680e12, attention=1300e12, attention_again=650e12), gpu("h100"), "bf16"), 6)
        2.0
    """
    attention = work.attention - work.attention_again
    return SLOWER[precision] * gpu.matrix_seconds(work.gemm, attention, work.attention_backward, flash=True)


def measured_row(
    case: str, exit_step: int | None, measured: Measurement, work: Work | None, gpu: Gpu | None, precision: str
) -> Row:
    """The row of one measurement.

    Args:
        work: what the case computes, where that was counted. gpu: the device's rates, where they are known.
    """
    row = {
        "case": case,
        "exit_step": exit_step,
        "seconds": measured.median,
        "low": min(measured.seconds),
        "high": max(measured.seconds),
        "repeats": len(measured.seconds),
        **attrs.asdict(measured, filter=lambda field, _: field.name != "seconds"),
    }
    if work is not None:
        row |= {"tflop": work.flops / 1e12, "tflop_once": (work.flops - work.attention_again) / 1e12}
        row["floor_seconds"] = None if gpu is None else floor_seconds(work, gpu, precision)
    return with_rates(row)


def failed_row(case: str, exit_step: int | None, error: str) -> Row:
    """The row of a case that raised an error."""
    return {"case": case, "exit_step": exit_step, "error": error}


def with_rates(row: Row) -> Row:
    """A row with what follows from its times: `tflops`, TFLOP a second, and `floor_share`, the floor over the time."""
    seconds, floor = row["seconds"], row.get("floor_seconds")
    rates = {"tflops": row["tflop"] / seconds if "tflop" in row else None, "floor_share": floor / seconds if floor else None}
    return row | rates


def summary_rows(rows: Sequence[Row], exits: Mapping[str, Sequence[int | None]], cycle: Mapping[str, int]) -> list[Row]:
    """Means over all exit steps of a phase, and the cycle where every phase has one.

    Args:
        rows: measured ones.
        exits: phase to all exit steps that it has; a phase of which only some were measured has no mean.
        cycle: how often each phase runs in a cycle.

    Example:
        >>> rows = [{"case": "p", "exit_step": i, "seconds": 1.0 + i, "low": 1.0, "high": 2.0} for i in range(2)]
        >>> [(row["case"], row["exit_step"], row["seconds"]) for row in summary_rows(rows, {"p": [0, 1]}, {"p": 5})]
        [('p', 'mean', 1.5), ('cycle', 'mean', 7.5)]
    """
    means: dict[str, Row] = {}
    for phase, all_exits in exits.items():
        found = {row["exit_step"]: row for row in rows if row["case"] == phase and "error" not in row}
        if set(all_exits) <= set(found):
            means[phase] = _combined([found[exit_] for exit_ in all_exits], [1 / len(all_exits)] * len(all_exits), phase)
    summary = [row for phase, row in means.items() if len(exits[phase]) > 1]
    if means and set(means) == set(cycle):
        summary.append(_combined([means[phase] for phase in cycle], list(cycle.values()), CYCLE) | {"runs": dict(cycle)})
    return summary


def _combined(rows: Sequence[Row], weights: Sequence[float], case: str) -> Row:
    """Weighted sums of times and work, and the largest memory."""
    combined: Row = {"case": case, "exit_step": MEAN}
    for key in ("seconds", "low", "high", "host_seconds", "tflop", "tflop_once", "floor_seconds"):
        values = [row[key] for row in rows if row.get(key) is not None]
        if len(values) == len(rows):
            combined[key] = sum(weight * value for weight, value in zip(weights, values, strict=True))
    for key in ("held", "allocated", "reserved"):
        combined[key] = max((row[key] for row in rows if row.get(key) is not None), default=None)
    return with_rates(combined)


def spread(row: Row) -> float:
    """Half of the way from the lowest to the highest repeat, as a share of the median.

    Example:
        >>> spread({"seconds": 2.0, "low": 1.9, "high": 2.3})
        0.1
    """
    return round((row["high"] - row["low"]) / 2 / row["seconds"], 6)
