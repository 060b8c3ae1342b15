"""The report of a study: means with their spread, the best of each group, drift, samples of the same prompts, failures."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

from sftk.errors import DataError
from sftk.runtime.study_report import write_samples, write_study_report

DRIFT = {"start": [0, 21, 42], "digit_accuracy": [0.8, 0.7, 0.6], "frechet": [5.0, 6.0, 7.0]}


def row(title, accuracy, frechet, group="Blocks of 3", seeds=2, **more):
    late = {"digit_accuracy": accuracy - 0.1, "frechet": frechet + 2}
    mean = {"digit_accuracy": accuracy, "frechet": frechet, "late": late, "train_seconds": 75.4}
    spread = {"digit_accuracy": 0.0125, "frechet": 0.25, "late": dict.fromkeys(late, 0.5), "train_seconds": 1.0}
    if seeds == 1:
        spread = {"digit_accuracy": None, "frechet": None, "late": dict.fromkeys(late), "train_seconds": None}
    runs = {str(seed): {"state": "done", "folder": f"runs/{title}/seed_{seed}", "train_seconds": 75.4} for seed in range(seeds)}
    return {"title": title, "group": group, "labels": {}, "runs": runs, "mean": mean, "spread": spread, "drift": DRIFT} | more


def summary(**rows):
    return {"study": "study", "doc": "Why < how.", "jobs": 2, "seconds": 75.0, "seeds": [0, 1], "rows": rows}


@pytest.fixture
def page(tmp_path):
    """`page(summary)`: the text of its report."""

    def write(value):
        (tmp_path / "summary.json").write_text(json.dumps(value))
        return write_study_report(tmp_path).read_text()

    return write


def cells(html, title):
    """The cells of every line of tables with that heading, marks kept."""
    found = re.findall(rf'<tr><th scope="row">{re.escape(title)}</th>(.*?)</tr>', html)
    return [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in found]


def test_means_spread_and_the_best_of_each_group(page):
    html = page(summary(
        a=row("A", 0.75, 6.0, labels={"steps": 50}),
        b=row("B", 0.8125, 7.0),
        c=row("C", 0.9, 3.0, group="Blocks of 1", seeds=1),
    ))  # fmt: skip
    around = "<small>± 0.013</small>", "<small>± 0.250</small>", "<small>± 0.500</small>"
    assert cells(html, "A")[0] == [
        "50", "2", f"0.750 {around[0]}", f"<strong>6.000</strong> {around[1]}", f"0.650 {around[2]}",
        f"<strong>8.000</strong> {around[2]}", "75",
    ]  # fmt: skip
    assert cells(html, "B")[0][2:4] == [f"<strong>0.812</strong> {around[0]}", f"7.000 {around[1]}"]
    assert cells(html, "C")[0] == ["", "1", "0.900", "3.000", "0.800", "5.000", "75"]  # alone in its group, nothing is best
    assert re.findall(r'class="group"><th colspan="8" scope="rowgroup">(.*?)<', html) == ["Blocks of 3", "Blocks of 1"]
    assert "Why &lt; how." in html
    assert "with up to 2 runs side by side" in html


def test_references_stand_above_and_without_seconds(page):
    value = summary(a=row("A", 0.75, 6.0)) | {"references": {"real": {"digit_accuracy": 0.996, "frechet": 1.8}}}
    html = page(value)
    assert cells(html, "Real clips")[0] == ["", "0.996", "1.800", *['<span class="missing">–</span>'] * 3]
    assert html.index("Real clips") < html.index(">A<")


def test_drift_by_group(page):
    without = row("B", 0.8, 7.0)
    del without["drift"]
    html = page(summary(a=row("A", 0.75, 6.0), b=without, c=row("C", 0.9, 3.0, group="Blocks of 1")))
    assert html.count('<ul class="legend">') == 2
    assert re.findall(r'<li class="c0">(.*?)</li>', html) == ["A", "C"]
    assert "<h2>Drift</h2>" not in page(summary(b=without))


def test_failed_runs_and_their_logs(page):
    failed = row("A <1>", 0.75, 6.0) | {"mean": {}, "spread": {}}
    failed["runs"]["0"] = {
        "state": "failed",
        "folder": "runs/a/seed_0",
        "message": "exit code 1",
        "log": ["error: <no>", "  b"],
    }
    failed["runs"]["1"] = {"state": "skipped", "folder": "runs/a/seed_1", "message": "needs b seed 1"}
    html = page(summary(a=failed))
    assert "No run has ended with figures." in html
    assert cells(html, "A &lt;1&gt;") == [
        ["0", "failed: exit code 1", "", "runs/a/seed_0"],
        ["1", "skipped: needs b seed 1", "", "runs/a/seed_1"],
    ]
    assert "end of its log</summary><pre>error: &lt;no&gt;\n  b</pre>" in html


def test_samples_of_the_same_prompts(tmp_path, page):
    rows = {name: row(name, 0.8, 5.0) for name in "abc"} | {"d": row("d", 0.8, 5.0, group="Blocks of 1")}
    prompts = ["a 3 moving left", "an 8 moving up"]
    for level, (name, prompted) in enumerate({"a": prompts, "b": prompts[::-1], "d": prompts[:1]}.items(), start=1):
        folder = tmp_path / "runs" / name / "seed_1" / "samples"
        folder.mkdir(parents=True)
        shade = [50 * level + (100 if prompt == prompts[1] else 0) for prompt in prompted]
        frames = np.asarray(shade, np.uint8)[:, None, None, None].repeat(30, 1).repeat(16, 2).repeat(16, 3)
        np.savez_compressed(folder / "student.npz", frames=frames, prompts=np.array(prompted))
    write_samples(tmp_path, rows)
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == [
        "Blocks_of_1,_a_3_moving_left.png", "Blocks_of_3,_a_3_moving_left.png", "Blocks_of_3,_an_8_moving_up.png",
    ]  # fmt: skip
    for prompt, shades in (("a_3_moving_left", (50, 100)), ("an_8_moving_up", (150, 200))):
        with Image.open(tmp_path / "samples" / f"Blocks_of_3,_{prompt}.png") as sheet:
            column = np.asarray(sheet.convert("L"))[:, -40]
        for shade in shades:
            assert (column == shade).sum() >= 60
        assert column.tolist().index(shades[0]) < column.tolist().index(shades[1])
    shown = page(summary(**copy.deepcopy(rows)))
    assert shown.count("<img") + shown.count("<video") == 5
    (tmp_path / "samples" / "old.png").write_text("")
    write_samples(tmp_path, rows)
    assert not (tmp_path / "samples" / "old.png").exists()


def test_no_study(tmp_path):
    with pytest.raises(DataError, match="expected the folder in which `sftk run` ended a study"):
        write_study_report(tmp_path)
