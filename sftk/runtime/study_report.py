"""A study's report: its rows in one table, how they drift, and their samples of the same prompts from the same noise."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sftk.errors import DataError
from sftk.runtime.curves import DRIFT_NOTE, drift_charts
from sftk.runtime.media import can_write_mp4, write_gif, write_mp4
from sftk.runtime.page import (
    better,
    decimals,
    duration,
    fact_list,
    note,
    number,
    scrolling_table,
    section,
    table_head,
    words,
    write_page,
)
from sftk.runtime.report import media_figures, recipe_details
from sftk.runtime.sheets import contact_sheet, video_grid

_HIDDEN = ("study", "doc", "rows", "references")
_SECONDS = "train_seconds"
_PROMPTS, _COLUMNS, _FPS = 3, 13, 8
_REFERENCES = {"real": "Real clips"}
_TITLES = {"": "first window", "late": "last window of the long rollout", "training": "training"}


def write_study_report(folder: str | Path) -> Path:
    """Writes `report.html`, and `samples/` where runs left any, into a study's folder from its `summary.json`.

    Raises:
        DataError: there is no summary.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> runs = {"0": {"state": "done", "folder": "runs/dmd/seed_0"}}
        >>> row = {"title": "DMD", "runs": runs, "mean": {"frechet": 6.8}, "spread": {"frechet": 0.5}}
        >>> _ = (folder / "summary.json").write_text(json.dumps({"study": "study", "rows": {"dmd": row}}))
        >>> "± 0.500" in write_study_report(folder).read_text()
        True
    """
    folder = Path(folder)
    if not (folder / "summary.json").exists():
        raise DataError(f"no study in {folder}; expected the folder in which `sftk run` ended a study")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows: dict[str, Any] = summary["rows"]
    write_samples(folder, rows)
    videos, sheets, left_out = media_figures(folder / "samples")
    study = folder / "study.yaml"
    parts = [
        note(summary["doc"]) if summary.get("doc") else "",
        fact_list({name: value for name, value in summary.items() if name not in _HIDDEN and value is not None}),
        section("Results", _table(rows, summary.get("references", {})), _legend(rows, summary)),
        *([section("Drift", *drift, note(DRIFT_NOTE))] if (drift := _drift(rows)) else []),
        section("Samples", *_samples(sheets, videos, left_out)),
        section("Runs", _runs(rows)),
        *(
            [section("Study", recipe_details(study.read_text(encoding="utf-8"), "The study as it was run"))]
            if study.exists()
            else []
        ),
    ]
    return write_page(folder / "report.html", words(summary["study"]), "sftk study report", [part for part in parts if part])


def write_samples(folder: Path, rows: Mapping[str, Any]) -> None:
    """Contact sheets and a video of the rows of each group: the same prompts from the same noise, each row's first seed.

    Args:
        folder: of the study; `samples/` in it is made anew.
        rows: those of its summary.

    Example:
        >>> write_samples(Path("no/such/folder"), {})
    """
    samples = folder / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    for group in _groups(rows):
        found = {row["title"]: clips for row in _of_group(rows, group) if (clips := _clips(folder, row))}
        prompts = [prompt for prompt in next(iter(found.values()), {}) if all(prompt in clips for clips in found.values())]
        for prompt in prompts[:_PROMPTS]:
            sheet = [(title, clips[prompt]) for title, clips in found.items()]
            contact_sheet(samples / f"{_file_name(group, prompt)}.png", sheet, columns=_COLUMNS)
        if prompts:
            shown = [(prompt, [clips[prompt] for clips in found.values()]) for prompt in prompts[:_PROMPTS]]
            grid, name = video_grid(shown, list(found)), _file_name(group, "side by side")
            write_gif(samples / f"{name}.gif", grid, _FPS, scale=1)
            if can_write_mp4():
                write_mp4(samples / f"{name}.mp4", grid, _FPS, scale=1)


def _clips(folder: Path, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Prompt to frames [F, H, W] that the row's first run with samples left."""
    done = [folder / run["folder"] / "samples" / "student.npz" for run in row["runs"].values() if run["state"] == "done"]
    path = next((path for path in done if path.exists()), None)
    if path is None:
        return {}
    with np.load(path) as saved:
        return dict(zip(saved["prompts"].tolist(), saved["frames"], strict=True))


def _groups(rows: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row.get("group", "") for row in rows.values()))


def _of_group(rows: Mapping[str, Any], group: str) -> list[Any]:
    return [row for row in rows.values() if row.get("group", "") == group]


def _file_name(group: str, name: str) -> str:
    return re.sub(r"[^\w,.-]+", "_", f"{group}, {name}" if group else name)


Column = tuple[str, str]
"""Group and metric."""


def _columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Groups of metrics, in the order in which rows have them; the training time stands last."""
    columns: dict[str, list[str]] = {"": []}
    for row in rows:
        for name, value in row.items():
            group, metrics = (name, list(value)) if isinstance(value, dict) else ("", [name])
            known = columns.setdefault(group, [])
            known += [metric for metric in metrics if metric not in (*known, _SECONDS)]
    return {group: metrics for group, metrics in columns.items() if metrics}


def _get(row: Mapping[str, Any], column: Column) -> Any:
    group, metric = column
    return ((row.get(group) or {}) if group else row).get(metric)


def _table(rows: Mapping[str, Any], references: Mapping[str, Any]) -> str:
    columns = _columns([*(row["mean"] for row in rows.values()), *references.values()])
    if not columns:
        return note("No run has ended with figures.")
    flat = [(group, metric) for group, metrics in columns.items() for metric in metrics]
    shown = [*(row["mean"] for row in rows.values()), *references.values()]
    places = {column: decimals(_get(row, column) for row in shown) for column in flat}
    labels = list(dict.fromkeys(label for row in rows.values() for label in row.get("labels", {})))
    lead = ["", *(words(label) for label in labels), "Seeds"]
    head = table_head(columns | {"training": [_SECONDS]}, _TITLES, lead).replace("Train seconds", "Seconds")
    body = ""
    if references:
        lines = [
            _line(_REFERENCES.get(name, words(name)), [*("" for _ in labels), ""], row, {}, flat, places, {})
            for name, row in references.items()
        ]
        body += f"<tbody>{''.join(lines)}</tbody>\n"
    for group in _groups(rows):
        mine = _of_group(rows, group)
        best = {column: _best([_get(row["mean"], column) for row in mine], column[1]) for column in flat}
        lines = [_row_line(row, labels, flat, places, best) for row in mine]
        span = len(lead) + len(flat) + 1
        title = f'<tr class="group"><th colspan="{span}" scope="rowgroup">{escape(group)}</th></tr>' if group else ""
        body += f"<tbody>{title}{''.join(lines)}</tbody>\n"
    return f'<div class="compact">{scrolling_table("Results", head, body)}</div>'


def _row_line(row: Mapping[str, Any], labels: Sequence[str], flat: Sequence[Column], places: Any, best: Any) -> str:
    done = sum(run["state"] == "done" for run in row["runs"].values())
    seeds = str(done) if done == len(row["runs"]) else f"{done} of {len(row['runs'])}"
    lead = [*(_label(row.get("labels", {}).get(label)) for label in labels), seeds]
    return _line(row["title"], lead, row["mean"], row["spread"], flat, places, best)


def _line(
    title: str,
    lead: Sequence[str],
    mean: Mapping[str, Any],
    spread: Mapping[str, Any],
    flat: Sequence[Column],
    places: Mapping[Column, int],
    best: Mapping[Column, Any],
) -> str:
    cells, before = "", ""
    for column in flat:
        value, around = _get(mean, column), _get(spread, column)
        text = number(value, places[column])
        text = f"<strong>{text}</strong>" if value is not None and value == best.get(column) else text
        text += f" <small>± {number(around, places[column])}</small>" if around is not None else ""
        cells += f"<td{_first(column[0] != before)}>{text}</td>"
        before = column[0]
    seconds = mean.get(_SECONDS)
    cells += f"<td{_first(True)}>{number(seconds, 0 if seconds is None or seconds >= 10 else 1)}</td>"
    lead_cells = "".join(f"<td>{escape(text)}</td>" for text in lead)
    return f'<tr><th scope="row">{escape(title)}</th>{lead_cells}{cells}</tr>\n'


def _first(first: bool) -> str:
    return ' class="first"' if first else ""


def _label(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _best(values: Sequence[Any], metric: str) -> Any:
    """The best of at least two values, where the metric's name tells which that is."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or not better(metric):
        return None
    return max(known) if better(metric) > 0 else min(known)


def _legend(rows: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    several = any(len(row["runs"]) > 1 for row in rows.values())
    sentence = (
        "Mean ± standard deviation over seeds; bold is the best of its block." if several else "Bold is the best of its block."
    )
    jobs = summary.get("jobs", 1)
    return note(sentence + (f" Training times were taken with up to {jobs} runs side by side." if jobs > 1 else ""))


def _samples(sheets: Sequence[str], videos: Sequence[str], left_out: Sequence[str]) -> list[str]:
    if not sheets:
        return [note("No run left samples.")]
    said = "The same prompts from the same noise, by the first seed of each row; the numbers count frames."
    return [note(said), *sheets, *videos, *left_out]


def _drift(rows: Mapping[str, Any]) -> list[str]:
    parts = []
    for group in _groups(rows):
        mine = {row["title"]: row["drift"] for row in _of_group(rows, group) if row.get("drift")}
        if mine:
            parts += [f"<h3>{escape(group)}</h3>"] if group else []
            parts.append(drift_charts(mine))
    return parts


def _runs(rows: Mapping[str, Any]) -> str:
    lines, logs = "", ""
    for row in rows.values():
        for seed, run in row["runs"].items():
            seconds = run.get(_SECONDS)
            cells = [seed, run["state"] + (f": {run['message']}" if run.get("message") else "")]
            cells += [duration(seconds) if seconds is not None else "", run.get("folder", "")]
            text = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            lines += f'<tr><th scope="row">{escape(row["title"])}</th>{text}</tr>\n'
            if run.get("log"):
                name, tail = escape(f"{row['title']}, seed {seed}: end of its log"), escape("\n".join(run["log"]))
                logs += f"<details open><summary>{name}</summary><pre>{tail}</pre></details>"
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Seed", "State", "Training", "Folder"))
    table = scrolling_table("Runs", f"<thead><tr><td></td>{head}</tr></thead>", f"<tbody>{lines}</tbody>")
    states = [run["state"] for row in rows.values() for run in row["runs"].values()]
    done = f"{states.count('done')} of {len(states)} runs are done"
    return f'{logs}<details class="runs"><summary>{done}</summary>{table}</details>'
