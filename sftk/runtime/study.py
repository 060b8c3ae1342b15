"""Runs a study: its runs side by side in processes of their own, then the summary and the report over all of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sftk.errors import SftkError
from sftk.runtime.evaluators import evaluation_problems
from sftk.runtime.interrupt import Interrupted, exit_code
from sftk.runtime.jobs import Job, available_threads, locked
from sftk.runtime.page import duration
from sftk.runtime.rundir import RunDir, write_text
from sftk.runtime.signals import STOPPING, catch_signals
from sftk.runtime.study_plan import PlannedRun, Runs, chain_lengths, plan_runs
from sftk.runtime.study_progress import StudyProgress, counts
from sftk.runtime.study_report import write_study_report
from sftk.runtime.study_summary import headline, write_summary
from sftk.spec.dump import dump_yaml
from sftk.spec.stores import check_stores
from sftk.spec.study import load_study

_POLL = 0.1


class StudyInterrupted(Interrupted):
    """A signal asked a study to stop; its runs were asked to save checkpoints first."""

    def __init__(self, name: str, runs: Runs):
        self.signal = name
        Exception.__init__(self, f"stopped by {name} with {counts(runs.values())}")


def run_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    run_dir: Path | None = None,
    jobs: int = 1,
    console: Console | None = None,
) -> RunDir:
    """Makes every run of a study that has not ended yet, and writes what came out; `sftk run` on a study is this function.

    Args:
        path: the study's file.
        overrides: see `load_study`.
        run_dir: the study's folder; by default `runs/<study>`. Runs there go on, and those that ended stay as they are.
        jobs: most runs at a time. Each gets its share of the processor's threads.
        console: where progress is shown.

    Returns:
        The study's folder, with `summary.json` and `report.html`.

    Raises:
        SpecError: the study or a recipe is wrong; nothing was written.
        SftkError: runs failed (the others were made, and the report says so); the folder is in use, or holds other runs.
        StudyInterrupted: a signal stopped the study after its runs saved checkpoints.
    """
    study = load_study(path, overrides, check=evaluation_problems)
    check_stores(row.stage for row in study.rows)
    folder = RunDir(run_dir or Path("runs") / study.name)
    if folder.recipe.exists():
        raise SftkError(f"{folder.root} holds a run of a recipe; take another --run-dir for the study")
    runs = plan_runs(study, folder.root)
    console = console or Console()
    with locked(folder.root / "lock") as lock, StudyProgress(console, runs) as progress:
        write_text(folder.root / "study.yaml", dump_yaml(study.resolved))
        before = sum(run.state == "done" for run in runs.values())
        progress.event(f"{len(runs)} runs, {before} of them done before, {jobs} at a time")
        began = time.monotonic()
        Pool(runs, progress, jobs, lock).work()
        write_summary(study, folder, runs, jobs=jobs, seconds=time.monotonic() - began)
        report = write_study_report(folder.root)
    console.print(f"finished: {report}", soft_wrap=True)
    failed = [run for run in runs.values() if run.state == "failed"]
    if failed:
        names = ", ".join(run.name for run in failed)
        skipped = sum(run.state == "skipped" for run in runs.values())
        more = f" and {skipped} that need them were not made" if skipped else ""
        raise SftkError(f"{len(failed)} of {len(runs)} runs failed: {names}{more}; run the study again to go on with them")
    return folder


class Pool:
    """Makes runs side by side, each when what it needs is done.

    Args:
        runs: (row, seed) to run; their states are kept up to date.
        progress: is told what happens.
        jobs: most at a time.
        lock: descriptors for the processes to hold on to.
    """

    def __init__(self, runs: Runs, progress: StudyProgress, jobs: int, lock: Sequence[int] = ()):
        self._runs, self._progress, self._jobs, self._lock = runs, progress, jobs, lock
        self._threads = max(1, available_threads() // jobs)
        self._running: dict[tuple[str, int], Job] = {}
        self._behind = chain_lengths(runs)

    def work(self) -> None:
        """Goes on until nothing is left to do.

        Raises:
            StudyInterrupted: a signal arrived and was passed on; every process has ended.
        """
        with catch_signals() as caught:
            passed_on = 0
            try:
                while self._running or (not caught and self._ready()):
                    for name in caught[passed_on:]:
                        self._stop(name)
                        passed_on += 1
                    while not caught and len(self._running) < self._jobs and (ready := self._ready()):
                        self._start(ready[0])
                    self._collect(stopping=bool(caught))
                    self._progress.tick()
                    time.sleep(_POLL)
            except BaseException:
                for job in self._running.values():
                    job.signal(signal.SIGKILL)
                    job.wait()
                raise
        if caught:
            raise StudyInterrupted(caught[0], self._runs)

    def _ready(self) -> list[PlannedRun]:
        """The runs that can begin, those that most others wait for first. Those that need a run that failed are given up."""
        ready = []
        for run in self._runs.values():
            if run.state != "waiting":
                continue
            needed = [self._runs[row, seed] for row, seed, _ in run.needs.values()]
            lost = next((other for other in needed if other.state in ("failed", "skipped")), None)
            if lost is not None:
                run.state, run.message = "skipped", f"needs {lost.name}"
                self._progress.note(f"{run.name}: skipped, as it needs {lost.name}")
            elif all(other.state == "done" for other in needed):
                ready.append(run)
        return sorted(ready, key=lambda run: -self._behind[run.row.name, run.seed])

    def _start(self, run: PlannedRun) -> None:
        run.state = "running"
        job = Job(run.arguments(self._runs), run.log, threads=self._threads, keep=self._lock)
        self._running[run.row.name, run.seed] = job
        self._progress.event(f"{run.name}: started")

    def _stop(self, name: str) -> None:
        self._progress.note(f"{name}: waiting for {len(self._running)} runs to save checkpoints")
        for job in self._running.values():
            job.signal(signal.Signals[name])

    def _collect(self, stopping: bool) -> None:
        for key, job in list(self._running.items()):
            code, run = job.poll(), self._runs[key]
            run.seconds = time.monotonic() - job.began
            if code is None:
                continue
            del self._running[key]
            if code == 0 and run.folder.summary.exists():
                run.state = "done"
                self._progress.event(f"{run.name}: done in {duration(round(run.seconds))}{headline(run.folder)}")
            elif stopping and code in {code for number in STOPPING for code in (exit_code(number), -number)}:
                run.state = "stopped"
                self._progress.event(f"{run.name}: stopped at step {run.step() or 0} of {run.steps}")
            else:
                how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
                run.state, run.message, run.log_tail = "failed", how, job.tail()
                lines = "".join(f"\n  | {line}" for line in run.log_tail)
                self._progress.note(f"{run.name}: failed ({how}); {run.log} ends:{lines}")
