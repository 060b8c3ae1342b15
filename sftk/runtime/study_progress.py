"""What a terminal shows while a study runs: a table of its runs that redraws, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sftk.runtime.page import duration
from sftk.runtime.study_plan import PlannedRun

_EVERY = 60.0
_STYLES = {"done": "green", "failed": "bold red", "running": "cyan", "stopped": "yellow", "skipped": "yellow"}


class StudyProgress:
    """Shows how far each run of a study is.

    On a terminal: a table with a row for each row of the study and a column for each seed. Elsewhere: a line when a run starts
    or ends, and once a minute one on those under way.

    Args:
        console: where to write.
        runs: (row, seed) to run.

    Example:
        >>> with StudyProgress(Console(force_terminal=False, width=80), {}) as progress:
        ...     progress.note("dmd seed 0: started")
        dmd seed 0: started
    """

    def __init__(self, console: Console, runs: Mapping[tuple[str, int], PlannedRun]):
        self._console, self._runs = console, runs
        self._began = self._shown = time.monotonic()
        redraws = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, get_renderable=self.table, refresh_per_second=2) if redraws else None

    def __enter__(self) -> StudyProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """Writes a line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, text: str) -> None:
        """Writes a line that the table would show anyway."""
        if not self._live:
            self.note(text)

    def tick(self) -> None:
        """To be called now and then."""
        now = time.monotonic()
        if not self._live and now - self._shown >= _EVERY:
            self._shown = now
            under_way = ", ".join(f"{run.name} {_far(run)}" for run in self._runs.values() if run.state == "running")
            self.note(f"{self._counts()}: {under_way}")

    def table(self) -> RenderableType:
        """The table as it stands now, and how many runs are in which state."""
        seeds = sorted({seed for _, seed in self._runs})
        table = Table(box=None, pad_edge=False)
        table.add_column("row", no_wrap=True)
        for seed in seeds:
            table.add_column(f"seed {seed}", no_wrap=True)
        for row in dict.fromkeys(row for row, _ in self._runs):
            table.add_row(row, *(self._cell(self._runs.get((row, seed))) for seed in seeds))
        return Group(table, Text(self._counts(), style="dim italic"))

    def _cell(self, run: PlannedRun | None) -> Text:
        if run is None:
            return Text("")
        return Text(_far(run), style=_STYLES.get(run.state, "dim"))

    def _counts(self) -> str:
        return f"{counts(self._runs.values())}, {duration(round(time.monotonic() - self._began))} gone"


def counts(runs: Iterable[PlannedRun]) -> str:
    """How many runs are in which state.

    Example:
        >>> counts([])
        '0 of 0 done'
    """
    states: list[Any] = [run.state for run in runs]
    parts = [f"{states.count('done')} of {len(states)} done"]
    parts += [f"{states.count(state)} {state}" for state in ("running", "failed", "stopped", "skipped") if state in states]
    return ", ".join(parts)


def _far(run: PlannedRun) -> str:
    if run.state == "done":
        return f"done in {duration(round(run.seconds))}" if run.seconds else "done before"
    if run.state != "running":
        return run.state
    step = run.step()
    if step is None:
        return "starting"
    return f"{step}/{run.steps}" if step < run.steps else "evaluating"
