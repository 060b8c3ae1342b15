"""The parts that reports are made of: one HTML file with its style in it, facts, sections, tables' heads, numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

_FACTS = ("recipe", "study", "device", "steps", "seconds", "seed", "seeds")
_NAMES = {"seconds": "Time", "sftk": "sftk", "torch": "PyTorch"}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:">
<title>{title} · sftk</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_page(path: Path, title: str, eyebrow: str, parts: Sequence[str]) -> Path:
    """Writes a page that needs no network; it is complete or not there.

    Args:
        path: the file.
        title, eyebrow: plain text; the eyebrow stands above the title in small letters.
        parts: HTML.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> page = write_page(Path(tempfile.mkdtemp()) / "page.html", "A < B", "report", [note("nothing yet")])
        >>> "<h1>A &lt; B</h1>" in page.read_text()
        True
    """
    style = resources.files("sftk.runtime").joinpath("report.css").read_text("utf-8")
    body = "\n".join([f'<p class="eyebrow">{escape(eyebrow)}</p>', f"<h1>{escape(title)}</h1>", *parts])
    part = path.with_name(path.name + ".part")
    part.write_text(_PAGE.format(title=escape(title), style=style, body=body), encoding="utf-8")
    os.replace(part, path)
    return path


def section(title: str, *parts: str) -> str:
    """A section with a heading.

    Example:
        >>> section("Results", note("none")).count("</")
        3
    """
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def note(sentence: str) -> str:
    """A sentence in soft ink.

    Example:
        >>> note("1 < 2")
        '<p class="note">1 &lt; 2</p>'
    """
    return f'<p class="note">{escape(sentence)}</p>'


def words(name: str) -> str:
    """A key as a reader sees it.

    Example:
        >>> words("digit_accuracy")
        'Digit accuracy'
    """
    spaced = re.sub(r"[_-]+", " ", name).strip()
    return spaced[:1].upper() + spaced[1:]


def better(name: str) -> int:
    """1 for a metric that is better when higher, -1 when lower, 0 where its name does not tell.

    Example:
        >>> better("digit_accuracy"), better("frechet"), better("train_seconds")
        (1, -1, 0)
    """
    return 1 if "accuracy" in name else -1 if re.search("frechet|distance|error|loss", name) else 0


def metric_title(name: str) -> str:
    """A metric's name with the direction in which it is better, where the name tells.

    Example:
        >>> metric_title("train_seconds")
        'Train seconds'
    """
    arrows = {1: '&nbsp;<span title="higher is better">↑</span>', -1: '&nbsp;<span title="lower is better">↓</span>', 0: ""}
    return escape(words(name).replace("Frechet", "Fréchet")) + arrows[better(name)]


def decimals(values: Iterable[Any]) -> int:
    """Decimals for a column, which is read by comparing its rows: fewer where its largest value is large.

    Example:
        >>> decimals([0.5, None]), decimals([0.5, 16.4])
        (3, 1)
    """
    largest = max((abs(float(value)) for value in values if value is not None and abs(float(value)) < float("inf")), default=0)
    return 3 if largest < 10 else 1


def number(value: Any, places: int) -> str:
    """A number, or a dash where there is none.

    Example:
        >>> number(1234.5678, 1), number(1e-5, 3)
        ('1,234.6', '1.00e-05')
    """
    if value is None:
        return '<span class="missing">–</span>'
    value = float(value)
    return f"{value:.2e}" if value and abs(value) < 10**-places else f"{value:,.{places}f}"


def table_head(columns: Mapping[str, Sequence[str]], titles: Mapping[str, Any], lead: Sequence[str] = ("",)) -> str:
    """The `<thead>` of a table of metrics: a line of groups where there are some, and one of metrics.

    Args:
        columns: group to metrics; the group "" has no title.
        titles: of groups, where words of their names do not do.
        lead: titles of the columns before the metrics.

    Example:
        >>> table_head({"": ["loss"]}, {}).count("<tr>"), table_head({"": ["loss"], "late": ["loss"]}, {}).count("<tr>")
        (1, 2)
    """
    rows = 1 + (len(columns) > 1)
    corner = "".join(f'<th rowspan="{rows}" scope="col">{escape(t)}</th>' if t else f'<td rowspan="{rows}"></td>' for t in lead)
    groups = "".join(
        f'<th colspan="{len(metrics)}"{" class=first" if group else ""}>{escape(str(titles.get(group, words(group))))}</th>'
        for group, metrics in columns.items()
        if metrics
    )
    head = "".join(
        f'<th scope="col"{" class=" + chr(34) + "first" + chr(34) if group and metric == metrics[0] else ""}>'
        f"{metric_title(metric)}</th>"
        for group, metrics in columns.items()
        for metric in metrics
    )
    return f"<thead><tr>{corner}{groups}</tr><tr>{head}</tr></thead>" if rows > 1 else f"<thead><tr>{corner}{head}</tr></thead>"


def scrolling_table(name: str, head: str, body: str) -> str:
    """A table that scrolls sideways where the window is narrow.

    Example:
        >>> "aria-label" in scrolling_table("Results", table_head({"": ["loss"]}, {}), "<tbody></tbody>")
        True
    """
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
    return f"{region}<table>{head}\n{body}</table></div>"


def fact_list(facts: Mapping[str, Any]) -> str:
    """Facts about a run, the well-known ones first.

    Example:
        >>> fact_list({"seconds": {"train": 75.0}})
        '<dl class="facts"><div><dt>Time</dt><dd>train 1 min 15 s</dd></div></dl>'
    """
    ordered = [name for name in _FACTS if name in facts] + [name for name in facts if name not in _FACTS]
    items = []
    for name in ordered:
        value = facts[name]
        if name == "evaluation" and isinstance(value, dict):  # its nested options stand in the recipe below
            value = {key: item for key, item in value.items() if item is not None and not isinstance(item, dict)}
        text = _fact(name, value, seconds=name == "seconds")
        wide = ' class="wide"' if len(text) > 24 else ""
        items.append(f"<div{wide}><dt>{escape(_NAMES.get(name, words(name)))}</dt><dd>{escape(text)}</dd></div>")
    return f'<dl class="facts">{"".join(items)}</dl>' if items else ""


def duration(seconds: float) -> str:
    """A time in the two units that matter.

    Example:
        >>> duration(2.345), duration(75), duration(3700)
        ('2.35 s', '1 min 15 s', '1 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _fact(name: str, value: Any, seconds: bool = False) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_fact(str(key), item, seconds)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(name, item, seconds) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)) or name in ("seed", "seeds"):
        return str(value)
    if seconds:
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
