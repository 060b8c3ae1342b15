"""Whole runs: folders and their names, precision, plugins, evaluation of what a run trains, stages through the command."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageSequence

from sftk.cli import main
from sftk.errors import SftkError, SpecError
from sftk.runtime.jobs import locked
from sftk.runtime.rundir import RunDir, open_run
from sftk.runtime.tracking import MultiTracker
from sftk.spec.recipe import load_recipe


def rows(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_folders_are_named_by_recipe_and_time_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = open_run("dmd", None, False), open_run("dmd", None, False)
    assert one.root != other.root
    assert all(re.fullmatch(r"runs/dmd/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-1)?", str(run.root)) for run in (one, other))


def test_resume_without_a_folder_takes_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2026-01-02_00-00-00", "2026-01-01_00-00-00"):
        (tmp_path / "runs" / "dmd" / name).mkdir(parents=True)
        (tmp_path / "runs" / "dmd" / name / "recipe.yaml").write_text("version: 1\n")
    (tmp_path / "runs" / "dmd" / "2026-01-03_00-00-00").mkdir()
    assert open_run("dmd", None, True).root.name == "2026-01-02_00-00-00"
    assert open_run("init", None, True).root.parent.name == "init"


def test_a_folder_that_is_taken(tmp_path):
    taken = open_run("dmd", tmp_path / "run", False)
    assert open_run("dmd", tmp_path / "run", False).root == taken.root  # it is empty
    taken.recipe.write_text("version: 1\n")
    with pytest.raises(SftkError, match="holds a run already; add --resume"):
        open_run("dmd", tmp_path / "run", False)
    assert open_run("dmd", tmp_path / "run", True).root == taken.root
    (tmp_path / "file").write_text("")
    with pytest.raises(SftkError, match="is a file; expected a folder"):
        open_run("dmd", tmp_path / "file", False)


def test_json_is_written_whole(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.read("a.json") is None
    run.write("a.json", {"a": [1.5]})
    with pytest.raises(TypeError):
        run.write("a.json", {"a": object()})
    assert run.read("a.json") == {"a": [1.5]}
    assert [path.name for path in run.root.iterdir()] == ["a.json"]


def test_a_broken_recipe_writes_nothing(tiny, train, tmp_path):
    with pytest.raises(SpecError):
        train(tiny(), "train.step=3")
    assert not (tmp_path / "run").exists()


def test_two_runs_of_a_recipe_are_equal(tiny, train):
    one, other = train(tiny(), to="one"), train(tiny(), to="other")
    assert one.metrics.read_bytes() == other.metrics.read_bytes()
    assert one.recipe.read_bytes() == other.recipe.read_bytes()


@pytest.mark.parametrize(
    "override", ["precision=bf16", "models.generator.dtype=bf16", "batch.per_rank=1", "compat=self_forcing"]
)
def test_variants_run(tiny, train, override):
    run = train(tiny(), override, "train.steps=2")
    assert [row["step"] for row in rows(run)] == [1, 2]
    assert all(isinstance(value, (int, float)) for row in rows(run) for name, value in row.items() if name != "stage")


def test_a_folder_that_another_process_trains_in(tiny, train, tmp_path):
    with locked(tmp_path / "run" / "lock"), pytest.raises(SftkError, match="is in use by another `sftk run`"):
        train(tiny())
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    train(tiny())


def test_seconds_of_all_attempts(tiny, train):
    run = train(tiny(), "train.steps=2")
    run.write("seconds.json", {"train tiny": 1000.0})
    train(tiny(), "train.steps=2", resume=True)
    assert 1000 < run.read("seconds.json")["train tiny"] < 2000, "what was there counts once"


def test_fewer_steps_than_were_made(tiny, train):
    train(tiny())
    with pytest.raises(SftkError, match=r"has made 4 steps, train.steps says 3; give at least 4"):
        train(tiny(), "train.steps=3", resume=True, allow_changes=True)


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tiny, train, monkeypatch):
    ids = []

    class Fake(MultiTracker):
        def __init__(self, *args, run_id, **options):
            ids.append(run_id)
            super().__init__([])

    monkeypatch.setattr("sftk.runtime.run.WandbTracker", Fake)
    for to in ("one", "one", "other"):
        train(tiny(), "track.wandb={}", "train.steps=1", to=to, resume=True)
    assert ids[0] == ids[1] != ids[2]


def test_no_steps_at_all(tiny, train):
    run = train(tiny(), "train.steps=0")
    assert not run.metrics.exists() or run.metrics.read_text() == ""
    assert (run.checkpoints("tiny") / "step_00000000" / "generator.safetensors").is_file()


def test_wrong_weights_end_with_a_message(tiny, tmp_path):
    recipe = tiny("fake_score: {size: SIZE, weights", "fake_score: {size: digits, weights")
    result = CliRunner().invoke(main, ["run", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 1, result.output
    assert "do not fit the model" in result.output
    assert "missing: blocks.2." in result.output


EVAL = """\
eval:
  use: digits
  with: {student: generator, clips: 2, late_frames: null, sample_prompts: 1, student_sampling: {steps: [1000], shift: 3.0}}
checkpoint"""
STEPS = "method: causal_ode, steps: 2, frames_per_block: 2"


def test_the_student_is_judged_before_and_after(tiny, train):
    run = train(tiny("checkpoint", EVAL), "train.steps=2")
    summary = run.read("summary.json")
    assert {"real", "student_before", "student_after"} <= summary.keys()
    assert "teacher" not in summary
    assert "late" not in summary["student_after"]
    assert summary["student_before"] == run.read("student_before.json")
    assert {path.name for path in run.samples.iterdir()} >= {"side_by_side.gif", "contact_sheet.png"}
    again = train(tiny("checkpoint", EVAL), "train.steps=2", resume=True).read("summary.json")
    rows = ("real", "student_before", "student_after")
    assert {name: again[name] for name in rows} == {name: summary[name] for name in rows}


@pytest.mark.parametrize(("rate", "seconds"), [((), 6 * 0.12), (("sample.fps=5",), 6 * 0.2)])
def test_videos_have_the_recipes_frame_rate(tiny, train, rate, seconds):
    """A GIF counts hundredths of a second, of which digits at 8 pictures a second have 12 each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tiny("checkpoint", EVAL), "train.steps=1", "eval.with.before=false", "track.tensorboard=true", *rate)
    events = EventAccumulator(str(run.tensorboard(run.read("summary.json")["recipe"])))
    events.Reload()
    logged = events.Images("samples/student")[0].encoded_image_string
    for gif in (io.BytesIO(logged), run.samples / "side_by_side.gif"):
        with Image.open(gif) as image:
            lasts = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert sum(lasts) == pytest.approx(1000 * seconds)


def test_drift_along_the_long_rollout(tiny, train):
    options = ("checkpoint", EVAL, "late_frames: null", "late_frames: 14, drift_every: 3", "steps: [1000]", STEPS)
    run = train(tiny(*options), "train.steps=1")
    summary = run.read("summary.json")
    drift, row = summary["drift"]["student_after"], summary["student_after"]
    assert drift["start"] == [0, 3, 6, 8]
    for metric in ("digit_accuracy", "direction_accuracy", "frechet"):
        assert len(drift[metric]) == 4
        assert (drift[metric][0], drift[metric][-1]) == (row[metric], row["late"][metric])
    assert summary["drift"].keys() == {"student_after"}
    assert "drift" not in run.read("student_before.json") | row
    saved = np.load(run.samples / "student.npz")
    assert (saved["frames"].shape, saved["frames"].dtype) == ((1, 14, 16, 16), np.uint8)
    assert list(saved["prompts"]) == ["a 3 moving left"]
    report = (run.root / "report.html").read_text()
    assert "<h2>Drift</h2>" in report
    assert report.count('class="curve c0"') == 3
    with Image.open(run.samples / "side_by_side.gif") as gif:
        assert gif.n_frames <= 6


def test_stages_through_the_command(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny()
    (tmp_path / "both.yaml").write_text(
        "version: 1\nstages:\n  - {name: first, recipe: tiny.yaml, with: {phases.critic.every: 2}}\n"
        "  - {name: last, recipe: tiny.yaml, with: {models.generator.weights: first/generator}}\n"
    )
    overrides = ["train.steps=1", "ema.generator.start=0", "first.train.steps=2", "first.optimizers.generator.lr=0.01"]
    result = CliRunner().invoke(main, ["run", "both.yaml", *overrides, "--run-dir", "run"])
    assert result.exit_code == 0, result.output
    run = RunDir(tmp_path / "run")
    found = rows(run)
    assert [(row["stage"], row["step"]) for row in found] == [("first", 1), ("first", 2), ("last", 1)]
    assert "critic/loss" not in found[1]
    assert run.read("summary.json")["steps"] == {"first": 2, "last": 1}
    first, last = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (first.recipe.optimizers["generator"].lr, first.recipe.train.steps) == (0.01, 2)
    assert (last.recipe.optimizers["generator"].lr, last.recipe.train.steps) == (1e-3, 1)
    sampled = CliRunner().invoke(main, ["sample", "run", "--prompt", "a 3 moving left", "--out", "a.gif", "--device", "cpu"])
    assert sampled.exit_code == 0, sampled.output
    assert "checkpoints/last/step_00000001/generator.ema.safetensors" in sampled.output
    only = CliRunner().invoke(main, ["show", "both.yaml", "--phase", "critic"]).output
    assert [line for line in only.splitlines() if line.startswith(("first.", "last."))] == ["first.critic", "last.critic"]
    shown = CliRunner().invoke(main, ["show", "both.yaml"]).output
    assert [line for line in shown.splitlines() if line.startswith(("first.", "last."))] == [
        "first.generator", "first.critic", "last.generator", "last.critic",
    ]  # fmt: skip
