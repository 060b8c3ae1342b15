"""Small line charts as SVG for reports; colours are the page's, so that they follow its light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 320, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24


def line_chart(title: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """A figure with the raw values, faint, and a line that averages them over about a twentieth of the steps.

    The scale is logarithmic, and says so, where positive values span more than a factor of 30. Non-finite values are
    left out of the line and marked on the axis.

    Args:
        title: plain text.
        steps: [N], ascending.
        values: [N].

    Returns:
        An HTML `<figure>` with classes `chart`, `raw`, `smooth`, `axis`, `lost`, styled by the page.

    Example:
        >>> figure = line_chart("critic/loss", [1, 2, 3], [0.5, 0.4, 0.3])
        >>> "<svg" in figure, "critic/loss" in figure
        (True, True)
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    finite = np.isfinite(y)
    if not finite.any():
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="note">no finite value</p></figure>'
    low, high = float(y[finite].min()), float(y[finite].max())
    q05, q95 = np.quantile(y[finite], [0.05, 0.95])
    log = low > 0 and q95 / q05 > 30
    ticks = log_ticks(low, high) if log else ticks_around(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def across(step: np.ndarray) -> np.ndarray:
        return _LEFT + (step - x[0]) / max(x[-1] - x[0], 1e-9) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: np.ndarray) -> np.ndarray:
        bottom, top, at = (np.log10(v) for v in (low, high, value)) if log else (low, high, value)
        return _HEIGHT - _BOTTOM - (at - bottom) / (top - bottom) * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for tick in ticks:
        at = float(up(np.asarray(tick)))
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{tick_label(tick, ticks, log)}</text>')
    edges = ((x[0], "start"), (x[-1], "end")) if x[-1] > x[0] else ((x[0], "start"),)
    for step, anchor in edges:
        at = float(across(np.asarray(step)))
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{step:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    sx, sy = x[finite], y[finite]
    # Averaged from both ends, because an average of the past alone lags behind a falling loss.
    smooth = (_average(sy, span=len(sy) / 40) + _average(sy[::-1], span=len(sy) / 40)[::-1]) / 2
    # A schedule (a learning rate, say) is no noise: averaging would only round its corners.
    noisy = len(sy) > 20 and float(np.abs(sy - smooth).mean()) > 0.01 * float(np.ptp(sy))
    if noisy:
        parts.append(_path("raw", *_thin(across(sx), up(sy))))
    line = (across(sx), up(smooth)) if noisy else _thin(across(sx), up(sy))
    parts.append(_path("smooth", *line) if len(sy) > 1 else _dot(*line))
    parts += [
        f'<line class="lost" x1="{at:.1f}" x2="{at:.1f}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM - 8}"/>'
        for at in across(x[~finite])[:200]
    ]
    notes = [f"ends {'near' if noisy else 'at'} {(smooth if noisy else sy)[-1]:.3g}"]
    notes += ["log scale"] if log else []
    notes += [f"{(~finite).sum()} not finite"] if not finite.all() else []
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{escape(title)} <small>{", ".join(notes)}</small></figcaption>{svg}</figure>'


def _average(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    keep = 1 - 1 / max(1.0, span)
    out, total, weight = [], 0.0, 0.0
    for value in values.tolist():
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return np.asarray(out)


def _thin(x: np.ndarray, y: np.ndarray, buckets: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest value of each bucket, so that thinning hides no spike."""
    if len(x) <= 2 * buckets:
        return x, y
    groups = np.array_split(np.arange(len(x)), buckets)
    keep = np.unique([pick for group in groups for pick in (group[y[group].argmin()], group[y[group].argmax()])])
    return x[keep], y[keep]


def _path(kind: str, x: np.ndarray, y: np.ndarray, most: int = 400) -> str:
    keep = np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[keep], y[keep], strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def _dot(x: np.ndarray, y: np.ndarray) -> str:
    return f'<circle class="smooth" cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="2.5"/>'


def ticks_around(low: float, high: float) -> list[float]:
    """Three to six round values that enclose the range.

    Example:
        >>> ticks_around(0.0, 10.0)
        [0.0, 5.0, 10.0]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [step * index for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose the range, at most about five.

    Example:
        >>> log_ticks(0.5, 70.0)
        [0.1, 1.0, 10.0, 100.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 4))
    return [10.0**power for power in range(first, last + stride, stride)]


def tick_label(tick: float, ticks: Sequence[float], log: bool) -> str:
    """A tick with as many decimals as its neighbours need.

    Example:
        >>> tick_label(0.5, [0.0, 0.5, 1.0], log=False), tick_label(100.0, [10.0, 100.0], log=True)
        ('0.5', '100')
    """
    largest = max(abs(value) for value in ticks)
    if log or largest >= 1e4 or largest < 1e-2:
        return f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e") if tick and not 1e-2 <= abs(tick) < 1e4 else f"{tick:g}"
    step = ticks[1] - ticks[0]
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
