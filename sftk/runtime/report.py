"""A run's report: one HTML file that holds its figures, videos and recipe, and needs no network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from sftk.errors import DataError
from sftk.runtime.charts import line_chart
from sftk.runtime.curves import DRIFT_NOTE, drift_charts
from sftk.runtime.figures import group_titles, metric_columns, table_rows
from sftk.runtime.page import decimals, fact_list, note, number, scrolling_table, section, table_head, words, write_page
from sftk.runtime.tracking import read_metrics

_MARKED = "student_after"
_TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
_EMBED_AT_MOST = 32 * 2**20


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder from what the run left there; whatever is missing is said to be missing.

    Reads `summary.json` (figures and facts), `metrics.jsonl` (curves), `recipe.yaml` (shown as it is) and `samples/`
    (MP4, GIF and PNG, embedded up to 32 MiB). In the summary, an entry that maps metric names to numbers, and perhaps
    groups of metrics to such maps, is a row of the table; every other entry is a fact about the run.

    Raises:
        DataError: there is no such folder, or `metrics.jsonl` has a broken line before its last.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "summary.json").write_text('{"recipe": "dmd", "student_after": {"frechet": 16.4}}')
        >>> "16.4" in write_report(folder).read_text()
        True
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"no run folder {run_dir}; expected the folder that `sftk run` wrote")
    summary, problem = _summary(run_dir / "summary.json")
    recipe = (run_dir / "recipe.yaml").read_text(encoding="utf-8") if (run_dir / "recipe.yaml").exists() else None
    metrics = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    rows = table_rows(summary)
    facts = {name: value for name, value in summary.items() if name not in rows and value is not None}
    if recipe and not {"seed", "seeds"} & facts.keys() and (seed := re.search(r"^seed:\s*(\S+)", recipe, re.MULTILINE)):
        facts["seed"] = seed[1]
    title = str(facts.pop("recipe", None) or run_dir.resolve().name)
    videos, sheets, left_out = media_figures(run_dir / "samples")
    drift, shipped = facts.pop("drift", None), facts.pop("shipped", None)
    parts = [
        fact_list(facts),
        section("Results", *_results(rows, summary, shipped or {}, problem)),
        *(
            [section("Drift", drift_charts({words(name): found for name, found in drift.items()}), note(DRIFT_NOTE))]
            if drift
            else []
        ),
        section("Samples", *(videos or [note("The run has no sample videos yet.")]), *sheets, *left_out),
        section("Training", *_curves(metrics)),
        section("Recipe", recipe_details(recipe) if recipe is not None else note("The run has no recipe.yaml.")),
    ]
    return write_page(run_dir / "report.html", title, f"sftk run report: {run_dir.resolve().name}", parts)


def _summary(path: Path) -> tuple[dict[str, Any], str | None]:
    if not path.exists():
        return {}, "There is no summary.json yet: the run goes on, or it was interrupted before its evaluation."
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"summary.json cannot be read ({error})."
    return (summary, None) if isinstance(summary, dict) else ({}, "summary.json does not hold an object.")


def _evaluation(summary: Mapping[str, Any]) -> dict[str, Any]:
    found = summary.get("evaluation")
    return found if isinstance(found, dict) else {}


def _results(
    rows: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any], shipped: Mapping[str, Any], problem: str | None
) -> list[str]:
    if not rows:
        return [note(problem or "The summary holds no metrics.")]
    clips = _evaluation(summary).get("clips")
    foreign = {name: count for name, count in shipped.items() if name in rows and count != clips}
    said = [
        note(f"{words(name)}: figures that ship with its weights, of {count} clips; Fréchet distances depend on how many.")
        for name, count in foreign.items()
    ]
    return [_table(rows, summary), *said]


def _table(rows: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    columns = metric_columns(rows)
    flat = [(group, metric) for group, metrics in columns.items() for metric in metrics]
    cells = {
        name: [(row.get(group) or {} if group else row).get(metric) for group, metric in flat] for name, row in rows.items()
    }
    places = [decimals(column) for column in zip(*cells.values(), strict=True)]
    first = [' class="first"' if group and metric == columns[group][0] else "" for group, metric in flat]
    body = ""
    for name, values in cells.items():
        row = "".join(f"<td{mark}>{number(v, p)}</td>" for v, p, mark in zip(values, places, first, strict=True))
        marked = ' class="mark"' if name == _MARKED else ""
        body += f'<tr{marked}><th scope="row">{escape(words(name))}</th>{row}</tr>\n'
    head = table_head(columns, group_titles(_evaluation(summary)))
    return scrolling_table("Results", head, f"<tbody>\n{body}</tbody>")


def media_figures(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Figures of a folder's videos and of its images, and a sentence on files that were too many to embed.

    Example:
        >>> media_figures(Path("no/such/folder"))
        ([], [], [])
    """
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in _TYPES and path.is_file()]
    chosen: dict[tuple[Path, bool], Path] = {}
    for path in sorted(paths, key=lambda path: (path.suffix.lower() == ".mp4" and _plays(path), path.suffix.lower() == ".gif")):
        chosen[path.with_suffix(""), path.suffix.lower() == ".png"] = path
    natural = sorted(chosen.values(), key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(path))])
    budget, embedded = _EMBED_AT_MOST, set[Path]()
    for path in reversed(natural):
        if path.stat().st_size <= budget:
            budget -= path.stat().st_size
            embedded.add(path)
    shown = [path for path in natural if path in embedded]
    videos = "".join(_figure(path, folder) for path in shown if path.suffix.lower() != ".png")
    sheets = [_figure(path, folder) for path in shown if path.suffix.lower() == ".png"]
    left = len(natural) - len(shown)
    notes = [note(f"Not embedded, to keep this page small: {left} more in samples/.")] if left else []
    return [f'<div class="media">{videos}</div>'] if videos else [], sheets, notes


def _plays(path: Path) -> bool:
    """Whether browsers play the MP4: they know H.264 (`avc1`), not MPEG-4 part 2."""
    return b"avc1" in path.read_bytes()


def _figure(path: Path, folder: Path) -> str:
    kind = _TYPES[path.suffix.lower()]
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    name = escape(path.relative_to(folder).with_suffix("").as_posix().replace("_", " "))
    if kind == "image/png":
        scroll = f'<div class="scroll" tabindex="0"><img alt="{name}" src="{source}"></div>'
        return f'<figure class="sheet"><figcaption>{name}</figcaption>{scroll}</figure>'
    if kind == "image/gif":
        return f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="{source}"></figure>'
    video = f'<video autoplay loop muted playsinline controls aria-label="{name}" src="{source}"></video>'
    return f"<figure><figcaption>{name}</figcaption>{video}</figure>"


def _curves(metrics: list[dict[str, Any]]) -> list[str]:
    """Charts by stage; within one by phase, its losses first."""
    if not metrics:
        return [note("No step has been logged yet.")]
    stages: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in metrics:
        series = stages.setdefault(row["stage"], {})
        for name, value in row.items():
            if name not in ("stage", "step") and isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    out = []
    for stage, series in stages.items():
        phases = list(dict.fromkeys(name.partition("/")[0] for name in series))
        order = sorted(series, key=lambda name: (phases.index(name.partition("/")[0]), not name.endswith("loss")))
        last = max(step for steps, _ in series.values() for step in steps) if series else 0
        heading = [f"<h3>Stage {escape(stage)}, {last:,} steps</h3>"] if len(stages) > 1 else []
        out += [*heading, f'<div class="charts">{"".join(line_chart(name, *series[name]) for name in order)}</div>']
    return [*out, note("Faint: each step. Line: an average over about a twentieth of the steps.")]


def recipe_details(text: str, title: str = "Resolved recipe") -> str:
    """A recipe, folded away.

    Example:
        >>> "2 lines" in recipe_details("version: 1\\nseed: 0")
        True
    """
    return f"<details><summary>{escape(title)}, {len(text.splitlines())} lines</summary><pre>{escape(text)}</pre></details>"
