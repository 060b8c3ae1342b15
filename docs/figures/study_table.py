"""The table of the digits study as Markdown, from `study.json`: `python docs/figures/study_table.py`."""

from __future__ import annotations

from typing import Any

from drift import study_rows

COLUMNS = (("digit_accuracy", 3), ("frechet", 1))


def study_table() -> str:
    """Mean, and standard deviation over seeds where there are several."""
    lines = []
    for group, row in ((row["group"], row) for row in study_rows().values()):
        if not lines or lines[-1][0] != group:
            lines.append((group, f"| **{group}** | | | | | | |"))
        cells = [row["title"], str(row["labels"]["sampling steps"]), str(row["steps"])]
        for mean, spread in ((row["mean"], row["spread"]), (row["mean"]["late"], row["spread"]["late"])):
            cells += [_cell(mean[name], spread[name], places) for name, places in COLUMNS]
        lines.append((group, f"| {' | '.join(cells)} |"))
    head = "| student | sampling steps | updates | digit | Fréchet | late digit | late Fréchet |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(line for _, line in lines) + "\n"


def _cell(mean: float, spread: Any, places: int) -> str:
    return f"{mean:.{places}f}" + ("" if spread is None else f" ± {spread:.{places}f}")


if __name__ == "__main__":
    print(study_table(), end="")
