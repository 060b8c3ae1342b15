"""What `recipes/digits/study.yaml` gave (`study.json`), drawn.

`python docs/figures/study.py` prints the table of docs/study.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

from drawing import TEXT, Drawing

SHADE = {
    "tf": "gl", "df": "gl", "tf_1": "gl", "df_1": "gl",
    "ode": "line", "cd": "line", "init_1": "line",
    "df_dmd": "ol", "tf_dmd": "ol", "df_dmd_1": "ol",
}  # fmt: skip
LEGEND = (
    ("bl", "self-forced inputs"),
    ("ol", "forced inputs"),
    ("gl", "many-step, forced"),
    ("line", "initialisation"),
)
TICKS = (5, 10, 20, 50, 100)
COLUMNS = (("digit_accuracy", 3), ("frechet", 1))
HEAD = ("student", "sampling steps", "updates", "digit", "Fréchet", "late digit", "late Fréchet")


def study_rows() -> dict[str, Any]:
    """Row name to title, group, means, spreads and drift."""
    return json.loads((Path(__file__).parent / "study.json").read_text(encoding="utf-8"))["rows"]


def drift() -> Drawing:
    """Frechet distance of a window of a 63-frame rollout against the frame at which the window begins."""
    d = Drawing(420, "Drift of the digits students over a rollout of 63 frames")
    rows = study_rows()
    groups = list(dict.fromkeys(row["group"] for row in rows.values()))
    for left, group in zip((64, 492), groups, strict=True):
        _panel(d, left, group, {name: row for name, row in rows.items() if row["group"] == group})
    for i, (kind, text) in enumerate(LEGEND):
        x = 64 + i * 180
        d.arrow((x, 398), (x + 26, 398), kind=kind, head=False)
        d.text(x + 34, 402, text, kind="dim", size=12)
    return d


def _panel(d: Drawing, left: float, title: str, rows: Mapping[str, Any]) -> None:
    top, width, height = 44, 196, 280
    low, high = log10(4), log10(110)

    def at(start: float, value: float) -> tuple[float, float]:
        return left + start / 42 * width, top + (high - log10(value)) / (high - low) * height

    d.text(left, 28, f"{title}: Fréchet distance", bold=True)
    d.box(left, top, width, height, "panel")
    for tick in TICKS:
        _, y = at(0, tick)
        d.text(left - 8, y + 4, str(tick), kind="dim", size=12, anchor="end")
    for start in (0, 21, 42):
        d.text(at(start, 4)[0], top + height + 18, str(start), kind="dim", size=12, anchor="middle")
    d.text(left + width / 2, top + height + 38, "first frame of the window", kind="dim", size=12, anchor="middle")
    ends = []
    for name, row in rows.items():
        points = [at(s, v) for s, v in zip(row["drift"]["start"], row["drift"]["frechet"], strict=True)]
        kind = SHADE.get(name, "bl")
        d.arrow(*points, kind=kind, head=False)
        ends.append((points[-1][1], row["title"].replace("Consistency distillation", "Consistency"), TEXT[kind]))
    for y, (_, text, kind) in zip(_apart([end[0] for end in sorted(ends)], 15), sorted(ends), strict=True):
        d.text(left + width + 8, y + 4, text, kind=kind, size=12)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places moved as little as possible, so that neighbours are at least `gap` apart."""
    found = list(places)
    for _ in range(200):
        for i in range(len(found) - 1):
            short = gap - (found[i + 1] - found[i])
            if short > 0.01:
                found[i] -= short / 2
                found[i + 1] += short / 2
    return found


def study_table() -> str:
    """Mean, and standard deviation over seeds where there are several."""
    lines = []
    for group, row in ((row["group"], row) for row in study_rows().values()):
        if not lines or lines[-1][0] != group:
            lines.append((group, f"| **{group}** {'| ' * len(HEAD)}".rstrip()))
        cells = [row["title"], str(row["labels"]["sampling steps"]), str(row["steps"])]
        for mean, spread in ((row["mean"], row["spread"]), (row["mean"]["late"], row["spread"]["late"])):
            cells += [_cell(mean[name], spread[name], places) for name, places in COLUMNS]
        lines.append((group, f"| {' | '.join(cells)} |"))
    head = f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|\n"
    return head + "\n".join(line for _, line in lines) + "\n"


def _cell(mean: float, spread: Any, places: int) -> str:
    return f"{mean:.{places}f}" + ("" if spread is None else f" ± {spread:.{places}f}")


if __name__ == "__main__":
    print(study_table(), end="")
