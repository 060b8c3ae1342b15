"""Charts of several methods in one frame, as SVG: a metric against the first frame of the window that it judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sftk.runtime.charts import log_ticks, tick_label, ticks_around
from sftk.runtime.page import metric_title, words

_WIDTH, _HEIGHT = 320, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 38
_LOG_ABOVE = 8
_COLOURS = 10
"""Classes `c0` to `c9` of the page's style; further series are dashed."""

DRIFT_NOTE = "Each point judges one window of the long rollout; the axis says at which frame the window begins."

Curve = tuple[Sequence[float], Sequence[float | None]]


def drift_charts(drift: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """A chart for each metric with a line for each method, and their legend.

    Args:
        drift: a method's title to `start`, the first frames of the windows, and for each metric as many values (None is none).

    Example:
        >>> found = {"start": [0, 21], "frechet": [5.0, 9.0]}
        >>> html = drift_charts({"teacher forcing": found, "dmd": found})
        >>> html.count("<polyline"), "first frame of the window" in html
        (2, True)
    """
    metrics = list(dict.fromkeys(name for found in drift.values() for name in found if name != "start"))
    charts = [
        _chart(metric, {name: (found["start"], found[metric]) for name, found in drift.items() if metric in found}, list(drift))
        for metric in metrics
    ]
    return f'{_legend(list(drift))}<div class="charts">{"".join(charts)}</div>'


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<li class="{_style(index)}">{escape(name)}</li>' for index, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _style(index: int) -> str:
    return f"c{index % _COLOURS}" + (" dashed" if index >= _COLOURS else "")


def _chart(metric: str, curves: Mapping[str, Curve], order: Sequence[str]) -> str:
    points = {name: _finite(*curve) for name, curve in curves.items()}
    values = [y for found in points.values() for _, y in found]
    starts = sorted({x for found in points.values() for x, _ in found})
    title = f"<figcaption>{metric_title(metric)}"
    if not values:
        return f'<figure class="chart">{title}</figcaption><p class="note">no finite value</p></figure>'
    low, high = min(values), max(values)
    log = low > 0 and high / low > _LOG_ABOVE and "accuracy" not in metric
    ticks = log_ticks(low, high) if log else ticks_around(low, high)
    if "accuracy" in metric:
        ticks = [tick for tick in ticks if 0 <= tick <= 1 + 1e-9]
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def across(x: float) -> float:
        return _LEFT + (x - starts[0]) / max(starts[-1] - starts[0], 1) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        bottom, top, at = (math.log10(v) for v in (low, high, y)) if log else (low, high, y)
        return _HEIGHT - _BOTTOM - (at - bottom) / (top - bottom) * (_HEIGHT - _BOTTOM - _TOP)

    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{up(tick) + 3.5:.1f}" text-anchor="end">{tick_label(tick, ticks, log)}</text>'
        for tick in ticks
    ]
    parts += [f'<text x="{across(x):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{x:g}</text>' for x in _few(starts)]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">first frame of the window</text>')
    for name, found in points.items():
        places = [(across(x), up(y)) for x, y in found]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.25"/>' for x, y in places)
        path = f'<polyline points="{line}"/>' if len(places) > 1 else ""
        parts.append(f'<g class="curve {_style(order.index(name))}"><title>{escape(name)}</title>{path}{dots}</g>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(words(metric))}">{"".join(parts)}</svg>'
    small = ", log scale" if log else ""
    return f'<figure class="chart">{title}{small}</figcaption>{svg}</figure>'


def _finite(starts: Sequence[float], values: Sequence[Any]) -> list[tuple[float, float]]:
    pairs = ((x, float(y)) for x, y in zip(starts, values, strict=True) if y is not None)
    return [(x, y) for x, y in pairs if math.isfinite(y)]


def _few(starts: Sequence[float], most: int = 7) -> list[float]:
    """At most so many of the starts, the first and the last among them."""
    if len(starts) <= most:
        return list(starts)
    stride = math.ceil((len(starts) - 1) / (most - 1))
    return [*starts[: len(starts) - stride : stride], starts[-1]]
