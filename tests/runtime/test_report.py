"""The report is well-formed, self-contained and escaped, and says what is missing."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sftk.errors import DataError
from sftk.runtime import report
from sftk.runtime.charts import line_chart
from sftk.runtime.media import can_write_mp4, write_gif, write_mp4
from sftk.runtime.report import write_report
from sftk.runtime.sheets import contact_sheet
from sftk.runtime.tracking import JsonlTracker

VOID = {"meta", "img", "line", "polyline", "circle", "br"}
CLIP = (np.random.default_rng(0).random((4, 16, 16)) * 255).astype(np.uint8)
EVIL = '<script>alert("x")</script>&"\''
ROWS = {
    "teacher": {"digit_accuracy": 0.85, "frechet": 4.6},
    "real": {"digit_accuracy": 0.994, "frechet": 1.7, "late": {"digit_accuracy": 0.991, "frechet": 1.9}},
    "student_before": {"digit_accuracy": 0.43, "frechet": 81.0, "late": {"digit_accuracy": 0.34, "frechet": 126.0}},
    "student_after": {"digit_accuracy": 0.68, "frechet": 20.0, "late": {"digit_accuracy": 0.67, "frechet": None}},
}
SUMMARY = {"recipe": "dmd", "device": "cpu", "steps": 240, "seconds": {"train": 123.4, "eval": 20.1}, **ROWS}


class Page(HTMLParser):
    """Parses strictly: every element is closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[dict[str, str | None], list[str]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data

    def sources(self) -> list[str]:
        return [attrs["src"] or "" for _, attrs in self.tags if "src" in attrs]


def page(folder: Path, summary: object = SUMMARY) -> Page:
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return Page(write_report(folder))


def test_table(tmp_path: Path):
    rows = page(tmp_path, SUMMARY | {"evaluation": {"frames": 9, "late_frames": 24}}).rows
    assert rows[0][1] == ["", "", "last 9 of 24 frames"]
    assert [cell.replace("\xa0", " ") for cell in rows[1][1]] == [
        "Digit accuracy ↑",
        "Fréchet ↓",
        "Digit accuracy ↑",
        "Fréchet ↓",
    ]
    assert [cells for _, cells in rows[2:]] == [
        ["Real", "0.994", "1.7", "0.991", "1.9"],
        ["Teacher", "0.850", "4.6", "–", "–"],
        ["Student before", "0.430", "81.0", "0.340", "126.0"],
        ["Student after", "0.680", "20.0", "0.670", "–"],
    ]
    assert [attrs.get("class") for attrs, _ in rows[2:]] == [None, None, None, "mark"]


def test_table_is_generic(tmp_path: Path):
    summary = {
        "memory": {"peak": 3.5},
        "student_after": {"psnr": 31.25},
        "ours": {"psnr": 2e-5, "fps": 16},
        "evaluation": {"clips": 6},
    }
    parsed = page(tmp_path, summary)
    assert [cells for _, cells in parsed.rows] == [
        ["", "Psnr", "Fps"],
        ["Student after", "31.2", "–"],
        ["Ours", "2.00e-05", "16.0"],
    ]
    assert "Memorypeak 3.5" in parsed.text
    assert "Evaluationclips 6" in parsed.text


def test_facts(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("version: 1\nseed: 17\n")
    text = page(tmp_path).text
    for fact in ("dmd", "Devicecpu", "Steps240", "Timetrain 2 min 3 s, eval 20.1 s", "Seed17", "Resolved recipe, 2 lines"):
        assert fact in text


def test_the_late_header_can_be_given(tmp_path: Path):
    parsed = page(tmp_path, SUMMARY | {"evaluation": {"late": "last 5 of 15 frames"}})
    assert parsed.rows[0][1][-1] == "last 5 of 15 frames"


@pytest.mark.parametrize(("clips", "said"), [(32, True), (600, False)])
def test_figures_of_other_clips_are_named(tmp_path: Path, clips: int, said: bool):
    text = page(tmp_path, SUMMARY | {"evaluation": {"clips": clips}, "shipped": {"teacher": 600}}).text
    assert ("Teacher: figures that ship with its weights, of 600 clips" in text) is said
    assert "Shipped" not in text


def test_seeds_and_switches_are_facts_as_they_are(tmp_path: Path):
    text = page(tmp_path, {"evaluation": {"seed": 20_240_607, "before": True, "clips": 1000}}).text
    assert "seed 20240607, before yes, clips 1,000" in text


def test_everything_is_escaped(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(f"doc: {EVIL}\n")
    write_gif(tmp_path / "samples" / "<b onclick=1>.gif", CLIP, 8)
    for stage in (EVIL, "other"):
        tracker = JsonlTracker(tmp_path / "metrics.jsonl", stage)
        tracker.scalars(1, {EVIL + "/loss": 1.0})
        tracker.close()
    parsed = page(tmp_path, {"recipe": EVIL, EVIL: EVIL, "student_after": {EVIL: 1.0, "late": {EVIL: 2.0}}})
    assert not {"script", "b"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert parsed.text.count(EVIL) >= 6


def test_media_are_embedded(tmp_path: Path):
    samples = tmp_path / "samples"
    write_gif(samples / "both.gif", CLIP, 8)
    write_gif(samples / "only_gif.gif", CLIP, 8)
    contact_sheet(samples / "both.png", [("a 3", CLIP)])
    if can_write_mp4():
        write_mp4(samples / "both.mp4", CLIP, 8)
    parsed = page(tmp_path)
    kinds = [re.match(r"data:(\w+/\w+);base64,", source) for source in parsed.sources()]
    expected = ["video/mp4" if can_write_mp4() else "image/gif", "image/gif", "image/png"]
    assert [kind and kind[1] for kind in kinds] == expected
    assert base64.b64decode(parsed.sources()[1].partition(",")[2]) == (samples / "only_gif.gif").read_bytes()
    video = next(attrs for tag, attrs in parsed.tags if tag == "video")
    assert {"autoplay", "loop", "muted", "playsinline"} <= video.keys()


def test_an_mp4_that_browsers_cannot_play_gives_way_to_the_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    av = pytest.importorskip("av")
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    write_gif(tmp_path / "samples" / "clip.gif", CLIP, 8)
    write_mp4(tmp_path / "samples" / "clip.mp4", CLIP, 8)
    (source,) = page(tmp_path).sources()
    assert source.startswith("data:image/gif")


def test_media_beyond_the_budget_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (9, 10, 100):
        write_gif(tmp_path / "samples" / f"dmd-{step}.gif", CLIP, 8)
    size = (tmp_path / "samples" / "dmd-9.gif").stat().st_size
    monkeypatch.setattr(report, "_EMBED_AT_MOST", 2 * size)
    parsed = page(tmp_path)
    assert [attrs["alt"] for tag, attrs in parsed.tags if tag == "img"] == ["dmd-10", "dmd-100"]
    assert "1 more in samples/" in parsed.text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path):
    write_gif(tmp_path / "samples" / "a.gif", CLIP, 8)
    parsed = page(tmp_path)
    assert not {"link", "script", "iframe"} & {tag for tag, _ in parsed.tags}
    assert "http://" not in (tmp_path / "report.html").read_text()
    assert "https://" not in (tmp_path / "report.html").read_text()


def test_curves_by_stage(tmp_path: Path):
    for stage, steps in (("init", 30), ("dmd", 20)):
        tracker = JsonlTracker(tmp_path / "metrics.jsonl", stage)
        for step in range(1, steps + 1):
            tracker.scalars(step, {"critic/grad_norm": 2.0, "critic/loss": math.nan if step == 5 else 1 / step})
        tracker.close()
    parsed = page(tmp_path)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 4
    assert "Stage init, 30 steps" in parsed.text
    assert "Stage dmd, 20 steps" in parsed.text
    assert parsed.text.index("critic/loss") < parsed.text.index("critic/grad_norm")
    assert parsed.text.count("1 not finite") == 2


def test_an_empty_run(tmp_path: Path):
    parsed = page(tmp_path, None)
    for sentence in ("no summary.json yet", "no sample videos yet", "No step has been logged yet", "no recipe.yaml"):
        assert sentence in parsed.text
    assert tmp_path.name in parsed.text


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_broken_summary_is_said(tmp_path: Path, text: str):
    (tmp_path / "summary.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "dmd", "st')
    assert "summary.json" in page(tmp_path, None).text


def test_no_folder(tmp_path: Path):
    with pytest.raises(DataError, match="no run folder"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0, 0.0],
        [3.0] * 50,
        [-1e-9, 1e-9],
        [math.nan, 1.0, math.inf],
        [1e-30, 1e30],
        [3e38, -3e38],
        list(range(5000)),
    ],
)
def test_charts_stay_inside_their_frame(values: list[float]):
    figure = line_chart("loss", range(1, len(values) + 1), values)
    numbers = re.findall(r'(?:[xy][12]?|c[xy])="([^"]+)"|points="([^"]+)"', figure)
    coordinates = [float(part) for pair in numbers for text in pair for part in re.split("[ ,]", text) if part]
    assert coordinates
    assert all(0 <= value <= 320 for value in coordinates)


def test_a_chart_of_nothing_finite():
    assert "no finite value" in line_chart("loss", [1, 2], [math.nan, math.inf])


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_thinning_keeps_spikes(noise: float):
    values = np.random.default_rng(0).random(5000) * noise
    values[1234] = 9.0
    lines = re.findall(r'points="([^"]*)"', line_chart("loss", range(5000), values))
    highest = min(float(point.partition(",")[2]) for line in lines for point in line.split())
    # Ticks from 0 to 10 over 134 units above the axis at 144.
    assert highest == pytest.approx(144 - 0.9 * 134, abs=0.06)
