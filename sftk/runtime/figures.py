"""The figures of a run: which entries of its summary are rows of a table, its columns, and the table on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sftk.runtime.page import decimals, words

_ROWS = ("real", "teacher", "student_before", "student_after")
_NO_ROWS = ("steps", "seconds", "evaluation", "drift", "shipped")


def table_rows(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a summary that are rows: the known ones first, others only if they share a metric with those.

    Example:
        >>> list(table_rows({"student_after": {"frechet": 5.0}, "real": {"frechet": 1.0}, "sizes": {"generator": 3}}))
        ['real', 'student_after']
    """
    like = {name: value for name, value in summary.items() if name not in _NO_ROWS and _is_row(value)}
    known = {name: like[name] for name in _ROWS if name in like}
    metrics = {metric for row in known.values() for metric in row}
    return known | {name: row for name, row in like.items() if not known or metrics & row.keys()}


def _is_row(value: Any) -> bool:
    def numbers(entry: Any) -> bool:
        return isinstance(entry, dict) and bool(entry) and all(_is_number(item) for item in entry.values())

    return isinstance(value, dict) and bool(value) and all(_is_number(item) or numbers(item) for item in value.values())


def _is_number(value: Any) -> bool:
    return value is None or value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool))


def metric_columns(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Group to metrics, in the order in which rows have them; the group "" comes first.

    Example:
        >>> metric_columns({"real": {"frechet": 1.0, "late": {"frechet": 2.0}}})
        {'': ['frechet'], 'late': ['frechet']}
    """
    columns: dict[str, list[str]] = {"": []}
    for row in rows.values():
        for name, value in row.items():
            group, metrics = (name, list(value)) if isinstance(value, dict) else ("", [name])
            known = columns.setdefault(group, [])
            known += [metric for metric in metrics if metric not in known]
    return columns


def group_titles(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Titles of the groups of metrics, where the evaluation says more of them than their names.

    Example:
        >>> group_titles({"frames": 21, "late_frames": 63})
        {'late': 'last 21 of 63 frames'}
    """
    frames, of = evaluation.get("frames"), evaluation.get("late_frames")
    late = {"late": f"last {frames} of {of} frames"} if frames and of else {}
    return late | {name: title for name, title in evaluation.items() if isinstance(title, str)}


def figures_table(summary: Mapping[str, Any]) -> Table | None:
    """The rows of a summary as a table for a terminal; None where it has none.

    Example:
        >>> figures_table({"recipe": "dmd", "student_after": {"frechet": 5.0}}).row_count
        1
    """
    rows = table_rows(summary)
    columns = [(group, metric) for group, metrics in metric_columns(rows).items() for metric in metrics]
    if not columns:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for group, metric in columns:
        table.add_column(words(f"{group} {metric}").lower(), justify="right", max_width=9)
    values = {name: [_value(row, column) for column in columns] for name, row in rows.items()}
    places = [decimals(column) for column in zip(*values.values(), strict=True)]
    for name, found in values.items():
        cells = ("–" if v is None else f"{float(v):.{p}f}" for v, p in zip(found, places, strict=True))
        table.add_row(words(name).lower(), *cells)
    return table


def _value(row: Mapping[str, Any], column: tuple[str, str]) -> Any:
    group, metric = column
    return ((row.get(group) or {}) if group else row).get(metric)
