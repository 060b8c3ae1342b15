"""No run of ten lines stands in two files of the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sftk"
RUN = 10


def test_no_ten_lines_twice():
    seen: dict[tuple[str, ...], str] = {}
    twice = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        name = str(path.relative_to(PACKAGE))
        for start in range(len(lines) - RUN + 1):
            run = tuple(lines[start : start + RUN])
            if seen.setdefault(run, name) != name:
                twice.add((seen[run], name, run[0]))
    assert not twice
