"""Metrics survive kills byte for byte; TensorBoard and wandb get what they were given."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sftk.errors import DataError, SftkError
from sftk.runtime.tracking import JsonlTracker, MultiTracker, TensorBoardTracker, Tracker, WandbTracker, read_metrics

CLIP = (np.arange(5)[:, None, None] * np.ones((1, 16, 16)) * 50).astype(np.uint8)


def log(path: Path, stage: str, steps: range) -> None:
    tracker = JsonlTracker(path, stage)
    for step in steps:
        tracker.scalars(step, {"critic/loss": 1 / step, "generator/loss": math.nan if step == 3 else step * 0.1})
    tracker.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_rows_read_back(path: Path):
    log(path, "dmd", range(1, 4))
    assert path.read_text().splitlines()[0] == '{"stage": "dmd", "step": 1, "critic/loss": 1.0, "generator/loss": 0.1}'
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert math.isnan(rows[2]["generator/loss"])
    assert rows[2]["critic/loss"] == 1 / 3


@pytest.mark.parametrize(("value", "text"), [(math.inf, '"inf"'), (-math.inf, '"-inf"'), (math.nan, '"nan"')])
def test_non_finite_values_are_strings(path: Path, value: float, text: str):
    tracker = JsonlTracker(path, "nan")
    tracker.scalars(1, {"loss": value})
    tracker.close()
    assert text in path.read_text()
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = read_metrics(path)[0]
    assert row["stage"] == "nan"
    np.testing.assert_equal(row["loss"], value)


def test_every_row_is_flushed(path: Path):
    tracker = JsonlTracker(path, "dmd")
    tracker.scalars(1, {"loss": 1.0})
    assert len(read_metrics(path)) == 1
    tracker.close()


@pytest.mark.parametrize("torn", ["", '{"stage": "dmd", "st', '{"stage": "dmd", "step": 9, "critic/loss": 0.1}', "\x00\x00"])
def test_killed_and_resumed_leaves_the_same_bytes(path: Path, tmp_path: Path, torn: str):
    whole = tmp_path / "whole.jsonl"
    for stage, steps in (("init", 4), ("dmd", 10), ("after", 3)):
        log(whole, stage, range(1, steps + 1))
    log(path, "init", range(1, 5))
    log(path, "dmd", range(1, 9))
    with path.open("a") as file:
        file.write(torn)
    JsonlTracker.truncate(path, "dmd", 6)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    log(path, "dmd", range(7, 11))
    log(path, "after", range(1, 4))
    assert path.read_bytes() == whole.read_bytes()
    assert [child.name for child in path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncating_an_early_stage_drops_later_ones(path: Path):
    for stage in ("init", "dmd", "after"):
        log(path, stage, range(1, 4))
    JsonlTracker.truncate(path, "init", 2)
    assert [(row["stage"], row["step"]) for row in read_metrics(path)] == [("init", 1), ("init", 2)]
    JsonlTracker.truncate(path, "init", 0)
    assert path.read_bytes() == b""


def test_truncating_at_a_stage_not_yet_begun_keeps_the_others(path: Path):
    log(path, "init", range(1, 4))
    before = path.read_bytes()
    JsonlTracker.truncate(path, "dmd", 0)
    assert path.read_bytes() == before
    JsonlTracker.truncate(path.with_name("none.jsonl"), "dmd", 0)
    assert not path.with_name("none.jsonl").exists()


def test_opening_drops_a_torn_line(path: Path):
    log(path, "dmd", range(1, 3))
    before = path.read_bytes()
    path.write_bytes(before + b'{"stage": "dmd", "step": 3, "criti')
    assert len(read_metrics(path)) == 2
    log(path, "dmd", range(3, 3))
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '{"stage": "dmd"}'])
def test_a_broken_line_within_is_named(path: Path, line: str):
    log(path, "dmd", range(1, 3))
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not a row"):
        read_metrics(path)


def test_tensorboard_reads_back(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path / "dmd")
    for step in (1, 2, 3):
        tracker.scalars(step, {"generator/loss": step * 0.5, "critic/loss": math.nan})
    tracker.video(2, "samples", CLIP, fps=8)
    tracker.close()
    resumed = TensorBoardTracker(tmp_path / "dmd", resumed_at=2)
    resumed.scalars(3, {"generator/loss": 9.0})
    resumed.close()

    events = EventAccumulator(str(tmp_path / "dmd"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("generator/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert math.isnan(events.Scalars("critic/loss")[0].value)
    (image,) = events.Images("samples")
    assert (image.step, image.height, image.width) == (2, 256, 256)
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert (gif.format, gif.size, getattr(gif, "n_frames", 1)) == ("GIF", (256, 256), 5)


def test_wandb_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SftkError, match=r"pip install 'sftk\[wandb\]'"):
        WandbTracker("sftk", tmp_path, stage="dmd")


@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path: Path):
    pytest.importorskip("wandb")
    tracker = WandbTracker("sftk", tmp_path, stage="dmd", mode="offline", config={"seed": 1}, run_id="run-1")
    for step in (1, 2):
        tracker.scalars(step, {"generator/loss": step * 0.5})
    tracker.video(2, "a prompt/with a slash", CLIP, fps=8)
    tracker.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert list(folder.rglob("media/videos/**/*.gif"))


class Recorder:
    def __init__(self, fail: bool = False):
        self.calls: list[tuple] = []
        self.fail = fail

    def scalars(self, step, values):
        self.calls.append(("scalars", step, dict(values)))

    def video(self, step, name, frames, fps):
        self.calls.append(("video", step, name, fps))

    def close(self):
        self.calls.append(("close",))
        if self.fail:
            raise OSError("disk full")


def test_multi_closes_all():
    trackers = [Recorder(), Recorder(fail=True), Recorder()]
    tracker: Tracker = MultiTracker(trackers)
    tracker.scalars(1, {"loss": 2.0})
    tracker.video(1, "samples", CLIP, 8)
    with pytest.raises(OSError, match="disk full"):
        tracker.close()
    for each in trackers:
        assert each.calls == [("scalars", 1, {"loss": 2.0}), ("video", 1, "samples", 8), ("close",)]
