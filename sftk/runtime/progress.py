"""What a terminal shows while a run trains: a bar for each stage, or now and then a plain line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

import attrs
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

_SHORT, _LONG = 10.0, 60.0


class TrainingProgress:
    """Shows how far a run is: per stage the steps, the speed, the time gone and to go, and the latest losses.

    On a terminal these are bars that redraw in place. Elsewhere (a log file, a pipe) they are plain lines without
    escape codes, for the first and the last step of a stage and between them at most one in 10 s, and that only after
    another 5% of the stage or a minute.

    Args:
        console: where to write; standard output by default.
        enabled: False shows nothing: for all ranks but the first.
        clock: seconds, for the plain lines.

    Example:
        >>> with TrainingProgress(Console(force_terminal=False, width=80), clock=iter(range(9)).__next__) as progress:
        ...     progress.stage("dmd", total=240, done=60)
        ...     progress.update(61, {"generator/loss": 0.25, "critic/loss": 0.125, "critic/grad_norm": 3.0})
        dmd  61/240  1.0 it/s  0:00:01 gone  0:02:59 to go  generator 0.25  critic 0.125
    """

    def __init__(self, console: Console | None = None, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic):
        self._console = console or Console()
        self._enabled = enabled
        self._bars = _Bars(self._console) if enabled and _redraws(self._console) else None
        self._clock = clock
        self._stage: _Stage | None = None

    def __enter__(self) -> TrainingProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage of `total` steps, `done` of which an earlier attempt took."""
        if not self._enabled:
            return
        task = self._bars.add(name, total, done) if self._bars else None
        now = 0.0 if self._bars else self._clock()
        self._stage = _Stage(name=name, total=total, done=done, began=now, task=task, shown_at=-_SHORT + now, shown=-total)

    def update(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Report that `step` steps of the stage are taken.

        Args:
            step: from 1 to the stage's total.
            values: named `phase/metric`. The losses among them are shown; a loss that is not given keeps its last value.
        """
        if not self._enabled:
            return
        assert self._stage is not None, "call stage() first"
        self._stage.losses.update(_losses(values or {}))
        if self._bars:
            self._bars.move(self._stage, step)
        else:
            self._plain(self._stage, step)

    def note(self, text: str) -> None:
        """Write a line of its own, above the bars: a checkpoint was saved, say."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _plain(self, stage: _Stage, step: int) -> None:
        now = self._clock()
        waited = now - stage.shown_at
        due = waited >= _LONG or (waited >= _SHORT and step - stage.shown >= 0.05 * stage.total)
        if not due and step < stage.total:
            return
        stage.shown_at, stage.shown = now, step
        gone = now - stage.began
        speed = (step - stage.done) / gone if gone > 0 else None
        parts = [stage.name, f"{step}/{stage.total}"]
        if speed:
            parts += [_speed(speed), f"{_clock(gone)} gone", f"{_clock((stage.total - step) / speed)} to go"]
        self.note(_fill(parts, stage.losses, self._console.width))


@attrs.define(kw_only=True)
class _Stage:
    name: str
    total: int
    done: int
    began: float
    task: int | None
    shown_at: float
    shown: int
    losses: dict[str, str] = attrs.field(factory=dict)


class _Bars(Progress):
    """One line of figures for each stage and one of losses below the last."""

    def __init__(self, console: Console):
        self._losses: dict[str, str] = {}
        super().__init__(
            TextColumn("{task.description}", markup=False, table_column=Column(max_width=16, no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(justify="right", no_wrap=True)),
            _Times(table_column=Column(justify="right", no_wrap=True)),
            console=console,
            refresh_per_second=4,
            expand=True,
        )

    def add(self, name: str, total: int, done: int) -> int:
        for task in self.task_ids:
            self.stop_task(task)
        self._losses = {}
        return self.add_task(name, total=total, completed=done)

    def move(self, stage: _Stage, step: int) -> None:
        assert stage.task is not None
        self._losses = dict(stage.losses)
        self.update(self.task_ids[stage.task], completed=step)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self._losses:
            yield Text(_fill([], self._losses, self.console.width - 2), style="dim", no_wrap=True, overflow="ellipsis")


class _Times(ProgressColumn):
    """Speed, time gone and time to go."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        gone = task.finished_time if task.finished else task.elapsed
        parts = [_speed(speed)] if speed else []
        parts += [f"{_clock(gone)} gone"] if gone is not None else []
        parts += [f"{_clock(task.time_remaining)} to go"] if not task.finished and task.time_remaining is not None else []
        return Text("  ".join(parts), style="cyan")


def _redraws(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _losses(values: Mapping[str, float]) -> dict[str, str]:
    """The losses among the values, short names and short numbers: `generator/loss` is `generator`."""
    shown = {name: value for name, value in values.items() if name.rpartition("/")[2].endswith("loss")}
    return {re.sub("[/_]loss$", "", name): f"{float(value):.4g}" for name, value in shown.items()}


def _fill(parts: list[str], losses: Mapping[str, str], width: int) -> str:
    """The parts, and as many losses as the width has room for."""
    line = "  ".join(parts)
    for name, value in losses.items():
        longer = "  ".join([line, f"{name} {value}"] if line else [f"{name} {value}"])
        if len(longer) > width:
            break
        line = longer
    return line


def _speed(steps_per_second: float) -> str:
    return f"{steps_per_second:.1f} it/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s/it"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
