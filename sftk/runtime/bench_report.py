"""Reports of benchmarks for the terminal: tables, and comparison with an earlier report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftk.errors import DataError
from sftk.runtime.bench_rows import Row, spread
from sftk.runtime.plan_rates import GIB

NOISE = 0.02
"""Share by which times may differ without meaning anything, besides their own spread; our choice."""
MORE_MEMORY = 0.01
"""Share from which a larger peak is marked."""

COLUMNS = ("seconds", "low - high", "n", "host", "TFLOP", "TFLOP/s", "floor", "of it", "GiB", "reserved")


def report_lines(report: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Iterator[str]:
    """A report as text.

    Args:
        report: from `run_bench`.
        before: an earlier report to compare with.
    """
    device = report["device"]
    versions = [f"{key} {device[key]}" for key in ("driver", "cuda", "torch") if device.get(key)]
    auto = " and ".join(dict.fromkeys(backend for found in device["auto"].values() for backend in found.values()))
    yield f"{device['name']}; {', '.join(versions)}; attention {', '.join(device['attention'])}; auto is {auto}"
    if before is not None and before["device"]["name"] != device["name"]:
        yield f"compared with a report of another device: {before['device']['name']}"
    for variant in report["variants"]:
        old = None if before is None else _same_variant(before, variant["name"])
        yield ""
        yield _heading(variant)
        if "error" in variant:
            yield f"  failed: {variant['error']}"
        rows = [*variant["rows"], *variant.get("summary", ())]
        if rows:
            yield from _table(rows, old)
        for profile in variant.get("profiles", ()):
            yield from profile_lines(profile)


def _heading(variant: Mapping[str, Any]) -> str:
    latents, batch = variant["latents"], variant["batch"]
    size = " x ".join(str(latents[axis]) for axis in ("frames", "channels", "height", "width"))
    how = f"{variant['precision']}, {'compiled' if variant['compiled'] else 'eager'}"
    kinds = sorted({f"{model['backend']}/{model['checkpoint']}" for model in variant["models"].values()})
    passes = f"{batch['passes']} x {batch['per_pass']}"
    return f"{variant['name']}: latents {size}, batch {passes}, {how}, attention/checkpoint {', '.join(kinds)}"


def _table(rows: Sequence[Row], before: Mapping[str, Any] | None) -> Iterator[str]:
    """The rows under each other, without columns that are empty in all of them."""
    columns = (*COLUMNS, *(("before",) if before is not None else ()))
    cells = {
        index: (*_cells(row), *(() if before is None else (comparison(row, _same_row(before, row)),)))
        for index, row in enumerate(rows)
        if "error" not in row
    }
    kept = [i for i in range(len(columns)) if any(found[i] != "-" for found in cells.values())]
    widths = [max(len(columns[i]), *(len(found[i]) for found in cells.values())) for i in kept]
    names = [row["case"] if row["exit_step"] is None else f"{row['case']} {row['exit_step']}" for row in rows]
    first = max(map(len, ("case", *names)))

    def line(name: str, found: Sequence[str]) -> str:
        padded = (f"{found[i]:>{width}}" for i, width in zip(kept, widths, strict=True))
        return "  ".join((f"  {name:{first}}", *padded)).rstrip()

    yield line("case", columns)
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        yield line(name, cells[index]) if index in cells else f"  {name:{first}}  failed: {row['error']}"
    for row in rows:
        if "pictures" in row:
            yield f"  {row['case']}: {row['pictures']} pictures, {row['pictures_per_second']:.1f} a second"
    if any(row.get("compiling") for row in rows):
        yield "  * something was compiled in each repeat, and is in the time"


def _cells(row: Row) -> Iterator[str]:
    def shown(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] / scale, form)

    yield shown("seconds", ".4g") + ("*" if row.get("compiling") else "")
    yield f"{row['low']:.4g} - {row['high']:.4g}"
    yield shown("repeats", ".0f")
    yield shown("host_seconds", ".3g")
    yield shown("tflop", ".4g")
    yield shown("tflops", ".3g")
    yield shown("floor_seconds", ".3g")
    yield shown("floor_share", ".0%")
    yield shown("allocated", ".1f", GIB)
    yield shown("reserved", ".1f", GIB)


def comparison(row: Row, before: Row | None) -> str:
    """A row against an earlier one, in words; SLOWER and MORE MEMORY mark what got worse.

    A time got worse when it grew by more than `NOISE` and by more than both spreads; a peak when it grew by `MORE_MEMORY`.

    Example:
        >>> old = {"seconds": 2.0, "low": 1.98, "high": 2.02, "allocated": 100}
        >>> comparison({"seconds": 2.2, "low": 2.19, "high": 2.21, "allocated": 100}, old)
        '2, +10.0% SLOWER'
        >>> comparison({"seconds": 1.0, "low": 1.0, "high": 1.0, "allocated": 150}, old)
        '2, -50.0%, +50% MORE MEMORY'
    """
    if before is None or "error" in before:
        return "-"
    change = row["seconds"] / before["seconds"] - 1
    text = f"{before['seconds']:.4g}, {change:+.1%}"
    if change > NOISE + spread(row) + spread(before):
        text += " SLOWER"
    if row.get("allocated") and before.get("allocated"):
        more = row["allocated"] / before["allocated"] - 1
        if more > MORE_MEMORY:
            text += f", {more:+.0%} MORE MEMORY"
    return text


def profile_lines(profile: Mapping[str, Any]) -> Iterator[str]:
    """A profile's table by family of kernels."""
    span, waits = profile["span"], profile["waits"]
    yield f"  {profile['case']}: {span:.4g} s, {waits} waits of the host; {profile['trace']}"
    for name, share in [*profile["families"].items(), ("idle", {"seconds": profile["idle"], "count": None})]:
        count = "" if share["count"] is None else f"{share['count']:>9} kernels"
        yield f"    {name:14}{share['seconds']:>9.4g} s {share['seconds'] / span:>6.1%}{count}".rstrip()


def read_report(path: Path) -> dict[str, Any]:
    """An earlier report.

    Raises:
        DataError: the file is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the report {path}: {error}; expected a file that `sftk bench --json` wrote") from error
    if not isinstance(report, dict) or "variants" not in report:
        raise DataError(f"{path} is no report of `sftk bench`; expected a file that `sftk bench --json` wrote")
    return report


def _same_variant(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The variant of that name, or the only one; an empty one where there is neither."""
    named = [variant for variant in report["variants"] if variant["name"] == name]
    return named[0] if named else report["variants"][0] if len(report["variants"]) == 1 else {"rows": []}


def _same_row(variant: Mapping[str, Any], row: Row) -> Row | None:
    rows = [*variant["rows"], *variant.get("summary", ())]
    same = (found for found in rows if (found["case"], found["exit_step"]) == (row["case"], row["exit_step"]))
    return next(same, None)
