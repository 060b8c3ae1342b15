"""Charts of several methods: every point where its value says, gaps left out, colours by order."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sftk.runtime.curves import _few, drift_charts


def drawn(html: str):
    """(class, points) of each curve of the only chart."""
    svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", html)[0])
    return svg, [
        (group.get("class"), [(float(dot.get("cx")), float(dot.get("cy"))) for dot in group.iter("circle")])
        for group in svg.iter("g")
    ]


def test_points_stand_where_their_values_say():
    html = drift_charts({"tf": {"start": [0, 10, 40], "frechet": [10.0, 20.0, 15.0]}})
    _, [(style, points)] = drawn(html)
    assert style == "curve c0"
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-2)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(0.5, abs=1e-2)
    assert y1 < y2 < y0
    assert "<li" in html


def test_methods_keep_their_colours_and_gaps_are_left_out():
    found = {f"m{i}": {"start": [0, 7], "digit_accuracy": [0.5, None if i == 1 else 0.6]} for i in range(12)}
    html = drift_charts(found)
    _, curves = drawn(html)
    assert [style for style, _ in curves][8:] == ["curve c8", "curve c9", "curve c0 dashed", "curve c1 dashed"]
    assert [len(points) for _, points in curves] == [2, 1] + [2] * 10
    assert html.count("<polyline") == 11
    assert len(re.findall("<li ", html)) == 12


def test_scales():
    _, curves = drawn(drift_charts({"a": {"start": [0, 1, 2], "frechet": [1.0, 10.0, 100.0]}}))
    heights = [y for _, y in curves[0][1]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    svg, curves = drawn(drift_charts({"a": {"start": [0, 1], "digit_accuracy": [1.0, 0.96]}}))
    assert not [text.text for text in svg.iter("text") if re.fullmatch(r"1\.0*[1-9]", text.text)]
    assert all(0 < y < 200 for _, y in curves[0][1])
    assert "no finite value" in drift_charts({"a": {"start": [0], "frechet": [float("nan")]}})


@pytest.mark.parametrize("count", range(1, 30))
def test_few_ticks_with_both_ends(count):
    starts = [3 * i for i in range(count)]
    found = _few(starts)
    assert len(found) <= 7
    assert (found[0], found[-1]) == (starts[0], starts[-1])
    gaps = [b - a for a, b in pairwise(found)]
    assert not gaps or min(gaps) >= max(3, 3 * ((count - 1) // 6))


def test_names_are_escaped():
    assert "<b>" not in drift_charts({"<b>": {"start": [0], "<b>": [1.0]}})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_accuracies_that_are_all_equal(value):
    svg, _ = drawn(drift_charts({"a": {"start": [0, 3], "digit_accuracy": [value, value]}}))
    labels = [text.text for text in svg.iter("text") if text.get("text-anchor") == "end"]
    assert len(labels) > 1
    assert all(0 <= float(label) <= 1 for label in labels)
