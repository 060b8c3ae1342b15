"""Where a run's numbers and sample videos go: a JSONL file, TensorBoard, Weights & Biases, or several of them."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sftk.errors import DataError, SftkError
from sftk.runtime.media import Frames, gif_bytes, write_gif

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Tracker(Protocol):
    """What a training loop calls. Steps count within a stage, from 1."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step, named `phase/metric`."""
        ...

    def video(self, step: int, name: str, frames: Frames, fps: float) -> None:
        """Record a sample video; frames as in `sftk.runtime.media.to_uint8`."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


class JsonlTracker:
    """One JSON object per step, appended to a file and flushed: `{"stage": "dmd", "step": 12, "generator/loss": 0.5}`.

    Rows hold nothing that depends on the clock, so that a run that was killed, truncated to its checkpoint and resumed
    leaves the same bytes as one that was not. Values that JSON cannot hold are strings: "nan", "inf", "-inf"
    (`read_metrics` turns them back). Videos are not recorded.

    Args:
        path: the file; its folder is created, and an incomplete last line is dropped.
        stage: the stage that the rows belong to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> tracker = JsonlTracker(path, stage="dmd")
        >>> tracker.scalars(1, {"generator/loss": 0.5, "critic/loss": math.inf})
        >>> tracker.close()
        >>> path.read_text().strip()
        '{"stage": "dmd", "step": 1, "generator/loss": 0.5, "critic/loss": "inf"}'
    """

    def __init__(self, path: str | Path, stage: str):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            _replace(path, _complete_lines(data))
        self._stage = stage
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        assert not {"stage", "step"} & values.keys(), "metrics are named phase/metric"
        row = {"stage": self._stage, "step": step, **{name: _to_json(float(value)) for name, value in values.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def video(self, step: int, name: str, frames: Frames, fps: float) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def truncate(path: str | Path, stage: str, step: int) -> None:
        """Drop what a resumed run will write again: rows of `stage` after `step`, and all rows of the stages after it.

        An incomplete last line is dropped too. Stages are ordered as they appear in the file; what is kept is kept byte
        for byte. A file that does not exist is left so.

        Raises:
            DataError: a line other than the last is not a row.
        """
        path = Path(path)
        if not path.exists():
            return
        kept, reached = [], False
        for line, row in _rows(path):
            reached |= row["stage"] == stage
            if not reached or (row["stage"] == stage and row["step"] <= step):
                kept.append(line + b"\n")
        _replace(path, b"".join(kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows that `JsonlTracker` wrote, non-finite values as floats; an incomplete last line is left out.

    Raises:
        DataError: a line other than the last is not a row.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"stage": "dmd", "step": 1, "critic/loss": "nan"}\\n{"stage": "d')
        >>> read_metrics(path)
        [{'stage': 'dmd', 'step': 1, 'critic/loss': nan}]
    """
    return [
        {key: _NON_FINITE.get(value, value) if key != "stage" else value for key, value in row.items()}
        for _, row in _rows(Path(path))
    ]


class TensorBoardTracker:
    """TensorBoard event files; videos are animated GIF summaries in its Images tab, at their own size up to 256 pixels.

    Args:
        log_dir: the folder of the event files. Steps count within a stage, so give each stage a folder of its own:
            TensorBoard then shows the stages as runs.
        resumed_at: the step of the checkpoint that a resumed run starts from; TensorBoard drops what an earlier
            attempt logged after it.

    Example:
        >>> import tempfile
        >>> tracker = TensorBoardTracker(tempfile.mkdtemp())
        >>> tracker.scalars(1, {"generator/loss": 0.5})
        >>> tracker.close()
    """

    def __init__(self, log_dir: str | Path, resumed_at: int | None = None):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._writer = EventFileWriter(str(log_dir), flush_secs=10)
        if resumed_at is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=resumed_at + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()])

    def video(self, step: int, name: str, frames: Frames, fps: float) -> None:
        height, width = frames.shape[1:3]
        scale = max(1, 256 // max(height, width))
        image = self._summary.Image(
            height=height * scale, width=width * scale, colorspace=3, encoded_image_string=gif_bytes(frames, fps, scale)
        )
        self._add(step, [self._summary.Value(tag=name, image=image)])

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))


class WandbTracker:
    """Weights & Biases (`pip install 'sftk[wandb]'`); metrics are named `stage/phase/metric` over the step `stage/step`.

    Args:
        project: the project's name.
        directory: where wandb keeps its files.
        stage: the stage that the values belong to.
        name: the run's display name.
        mode: "online", "offline" or "disabled"; by default what `WANDB_MODE` says, else online.
        config: the resolved recipe, to be shown beside the run.
        run_id: a stable id, so that a resumed run, or a later stage, goes on in the same wandb run.

    Raises:
        SftkError: wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        directory: str | Path,
        *,
        stage: str,
        name: str | None = None,
        mode: str | None = None,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ):
        try:
            self._wandb: Any = import_module("wandb")
        except ImportError as error:
            raise SftkError(f"tracking with wandb needs the wandb package ({error}); pip install 'sftk[wandb]'") from error
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._stage = stage
        self._run: Any = self._wandb.init(
            project=project,
            dir=str(directory),
            name=name,
            mode=mode,
            config=dict(config or {}),
            id=run_id,
            resume="allow" if run_id else None,
        )
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        named = {f"{self._stage}/{name}": float(value) for name, value in values.items()}
        self._run.log({f"{self._stage}/step": step, **named})

    def video(self, step: int, name: str, frames: Frames, fps: float) -> None:
        # From an array wandb needs moviepy; from a file it does not.
        file = re.sub(r"[^\w.-]+", "_", f"{self._stage}-{name}-{step}") + ".gif"
        path = write_gif(Path(self._run.dir) / "sftk" / file, frames, fps)
        video = self._wandb.Video(str(path), format="gif")
        self._run.log({f"{self._stage}/step": step, f"{self._stage}/{name}": video})

    def close(self) -> None:
        self._run.finish()


class MultiTracker:
    """Hands everything to several trackers, and closes all of them even if one fails.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> tracker = MultiTracker([JsonlTracker(folder / "metrics.jsonl", "dmd"), TensorBoardTracker(folder / "dmd")])
        >>> tracker.scalars(1, {"generator/loss": 0.5})
        >>> tracker.close()
    """

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = tuple(trackers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def video(self, step: int, name: str, frames: Frames, fps: float) -> None:
        for tracker in self._trackers:
            tracker.video(step, name, frames, fps)

    def close(self) -> None:
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close)


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a stage and a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not a row of metrics: {error}; remove the line") from error
        rows.append((line, row))
    return rows


def _complete_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
