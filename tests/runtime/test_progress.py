"""Bars on a terminal, few plain lines elsewhere, 80 columns in both."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from rich.console import Console

from sftk.runtime.progress import TrainingProgress

LOSSES = {"generator/loss": 0.123456, "critic/loss": 2.0, "critic/grad_norm": 7.0}


def plain(steps: int, seconds_per_step: float, losses: dict[str, float] | None = None, done: int = 0) -> list[str]:
    out = io.StringIO()
    ticks = itertools.count()
    with TrainingProgress(Console(file=out, width=80), clock=lambda: next(ticks) * seconds_per_step) as progress:
        progress.stage("dmd", total=steps, done=done)
        for step in range(done + 1, steps + 1):
            progress.update(step, losses or LOSSES)
    return out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("steps", "seconds_per_step", "most"),
    [(1000, 0.001, 2), (1000, 0.1, 11), (1000, 1.0, 22), (3600, 1.0, 61), (10, 100.0, 10)],
)
def test_plain_lines_are_few(steps: int, seconds_per_step: float, most: int):
    lines = plain(steps, seconds_per_step)
    assert 2 <= len(lines) <= most
    assert lines[0].startswith(f"dmd  1/{steps}")
    assert lines[-1].startswith(f"dmd  {steps}/{steps}")
    assert all("\x1b" not in line and len(line) <= 80 for line in lines)


def test_plain_line_content():
    assert plain(240, 1.0, done=238) == [
        "dmd  239/240  1.0 it/s  0:00:01 gone  0:00:01 to go  generator 0.1235  critic 2",
        "dmd  240/240  1.0 it/s  0:00:02 gone  0:00:00 to go  generator 0.1235  critic 2",
    ]
    assert "4.0 s/it  0:00:04 gone  0:00:04 to go" in plain(2, 4.0)[0]


def test_plain_lines_drop_losses_that_do_not_fit():
    lines = plain(3, 1.0, {f"phase_{index}/loss": float("nan") for index in range(9)})
    assert "phase_0 nan" in lines[0]
    assert "phase_8" not in lines[0]
    assert len(lines[0]) <= 80


def test_a_loss_keeps_its_last_value():
    out = io.StringIO()
    ticks = itertools.count(step=30)
    with TrainingProgress(Console(file=out, width=80), clock=lambda: next(ticks)) as progress:
        progress.stage("dmd", total=3)
        progress.update(1, {"generator/loss": 0.5, "critic/loss": 0.1})
        progress.update(2, {"critic/loss": 0.2})
        progress.stage("next", total=1)
        progress.update(1)
    lines = out.getvalue().splitlines()
    assert lines[1].endswith("generator 0.5  critic 0.2")
    assert lines[2].endswith("to go")


def terminal() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=80, height=24, _environ={"TERM": "xterm"}), out


def test_bars_fit_the_terminal():
    console, out = terminal()
    with TrainingProgress(console) as progress:
        progress.stage("causal_initialisation", total=3)
        for step in (1, 2, 3):
            progress.update(step, {"denoiser/loss": 0.25})
        progress.stage("dmd", total=123_456, done=100_000)
        progress.update(100_001, LOSSES)
        progress.note("saved [a] checkpoint")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, lines)) <= 80
    assert lines[-1].strip() == "generator 0.1235  critic 2"
    assert "100001/123456" in lines[-2]
    assert "3/3" in lines[-3]
    assert "saved [a] checkpoint" in text


def test_an_error_restores_the_cursor():
    console, out = terminal()

    def interrupted() -> None:
        with TrainingProgress(console) as progress:
            progress.stage("dmd", total=3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_other_ranks_are_silent():
    console, out = terminal()
    with TrainingProgress(console, enabled=False) as progress:
        progress.stage("dmd", total=1)
        progress.update(1, LOSSES)
        progress.note("hello")
    assert out.getvalue() == ""
