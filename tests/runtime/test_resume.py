"""A run that was killed, interrupted or torn goes on exactly as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from sftk.cli import main
from sftk.errors import NonFiniteError
from sftk.runtime.checkpoint import last_checkpoint, list_checkpoints
from sftk.runtime.interrupt import Interrupted
from sftk.runtime.meter import Meter
from sftk.runtime.signals import catch_signals

NAMES = {"fake_score", "fake_score.optimizer", "generator", "generator.ema", "generator.optimizer"}


def weights(run, stage="tiny"):
    folder = last_checkpoint(run.checkpoints(stage) if hasattr(run, "checkpoints") else run / "checkpoints" / stage)
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        different = [key for key in one[name] if not torch.equal(one[name][key], other[name][key])]
        assert different == [], name


def rows(run):
    path = run.metrics if hasattr(run, "metrics") else run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_rows(folder, count, process, saved=0):
    """Until so many steps are written down and a checkpoint of step `saved`, which follows in its own time, is there."""
    deadline = time.monotonic() + 60
    while len(rows(folder) if complete(folder) else []) < count or (
        saved and not (folder / "checkpoints" / "tiny" / f"step_{saved:08d}").exists()
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def complete(folder):
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().endswith(b"\n")


def test_killed_and_resumed_in_another_process_equals_uninterrupted(tiny, train, command, tmp_path):
    recipe = tiny("frames: 6", "frames: 12")
    whole = train(recipe, "train.steps=8", to="whole")
    killed = tmp_path / "killed"
    process = command("run", recipe, "train.steps=8", "--run-dir", killed, cwd=tmp_path)
    wait_for_rows(killed, 5, process, saved=4)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 4 <= int(last_checkpoint(killed / "checkpoints" / "tiny").name[-8:]) < 8
    assert not (killed / "summary.json").exists()
    (killed / "checkpoints" / "tiny" / ".writing-00000007").mkdir(exist_ok=True)
    train(recipe, "train.steps=8", to="killed", resume=True)
    assert (killed / "metrics.jsonl").read_bytes() == whole.metrics.read_bytes()
    assert [row["step"] for row in rows(whole)] == list(range(1, 9))
    assert weights(whole).keys() == NAMES
    assert_same(weights(killed), weights(whole))
    assert not list(killed.glob("checkpoints/*/.writing-*"))


@pytest.mark.parametrize("torn", ["empty", "truncated"])
def test_a_torn_checkpoint_is_passed_over(tiny, train, tmp_path, torn):
    recipe = tiny()
    whole = train(recipe, "train.steps=6", to="whole")
    again = tmp_path / "again"
    shutil.copytree(whole.root, again)
    newest = again / "checkpoints" / "tiny" / "step_00000006"
    writing = newest.with_name(".writing-00000006")
    newest.rename(writing)
    data = (writing / "generator.safetensors").read_bytes()
    (writing / "generator.safetensors").write_bytes(data[: len(data) // 2] if torn == "truncated" else b"")
    resumed = train(recipe, "train.steps=6", to="again", resume=True)
    assert [path.name for path in list_checkpoints(resumed.checkpoints("tiny"))] == ["step_00000004", "step_00000006"]
    assert not writing.exists()
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    assert_same(weights(resumed), weights(whole))


def test_resume_without_a_checkpoint_starts_afresh(tiny, train):
    recipe = tiny()
    whole = train(recipe, to="whole")
    fresh = train(recipe, to="fresh", resume=True)
    assert fresh.metrics.read_bytes() == whole.metrics.read_bytes()
    shutil.rmtree(fresh.root / "checkpoints")
    with fresh.metrics.open("a") as file:
        file.write('{"stage": "tiny", "st')
    again = train(recipe, to="fresh", resume=True)
    assert again.metrics.read_bytes() == whole.metrics.read_bytes()
    assert_same(weights(again), weights(whole))


def test_a_finished_run_resumes_to_the_same_files(tiny, train):
    run = train(tiny())
    before, newest = run.metrics.read_bytes(), last_checkpoint(run.checkpoints("tiny")).stat().st_mtime_ns
    train(tiny(), resume=True)
    assert run.metrics.read_bytes() == before
    assert last_checkpoint(run.checkpoints("tiny")).stat().st_mtime_ns == newest


def test_interrupted_by_ctrl_c(tiny, train, command, tmp_path):
    recipe = tiny("frames: 6", "frames: 12", "every: 2}\ntrack", "every: 100}\ntrack")
    whole = train(recipe, "train.steps=8", to="whole")
    stopped = tmp_path / "stopped"
    process = command("run", recipe, "train.steps=8", "--run-dir", stopped, cwd=tmp_path)
    wait_for_rows(stopped, 2, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (saved,) = list_checkpoints(stopped / "checkpoints" / "tiny")
    done = int(saved.name[-8:])
    assert 2 <= done < 8
    assert f"stopped by SIGINT after step {done}; saved {saved}; go on with --resume" in error
    assert len(rows(stopped)) == done
    resumed = train(recipe, "train.steps=8", to="stopped", resume=True)
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    assert_same(weights(resumed), weights(whole))


def interrupt_at(monkeypatch, step, number=signal.SIGTERM):
    from sftk.runtime.step import TrainingStep

    plain = TrainingStep.__call__

    def call(self, current):
        if current == step:
            signal.raise_signal(number)
        return plain(self, current)

    monkeypatch.setattr(TrainingStep, "__call__", call)


@pytest.mark.parametrize("step", [2, 3])
def test_a_signal_stops_after_the_step_even_after_the_last_one(tiny, train, monkeypatch, step):
    recipe = tiny()
    whole = train(recipe, to="whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted) as caught:
            train(recipe, to="stopped")
    assert (caught.value.signal, caught.value.step) == ("SIGTERM", step + 1)
    resumed = train(recipe, to="stopped", resume=True)
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    assert_same(weights(resumed), weights(whole))


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == ["SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


STAGES = """\
version: 1
stages:
  - {name: teacher, recipe: teacher.yaml}
  - {name: init, recipe: init.yaml, with: {models.denoiser.weights: teacher/denoiser}}
  - name: dmd
    recipe: tiny.yaml
    with:
      models.generator.weights: init/denoiser
      models.real_score.weights: teacher/denoiser
      models.fake_score.weights: teacher/denoiser
"""
PLAIN = """\
version: 1
latents: {frames: 6, channels: 4, height: 8, width: 8}
data: {use: digits}
models: {denoiser: {size: SIZE, weights: FOLDER/student.safetensors}}
optimizers: {denoiser: {lr: 1e-3}}
phases: [{name: NAME, update: denoiser, graph: specs/GRAPH.yaml}]
train: {steps: 2}
batch: {global: 2}
ema: {denoiser: {decay: 0.5}}
checkpoint: {every: 1, keep: 5}
track: {tensorboard: false}
device: cpu
"""


@pytest.fixture
def staged(tiny, tmp_path, tiny_weights):
    size = tiny().read_text().split("generator: {size: ")[1].split(", weights")[0]
    for name, graph in (("teacher", "flow_matching"), ("init", "teacher_forcing")):
        (tmp_path / f"{name}.yaml").write_text(
            PLAIN.replace("SIZE", size).replace("NAME", name).replace("GRAPH", graph).replace("FOLDER", str(tiny_weights))
        )
    (tmp_path / "all.yaml").write_text(STAGES)
    return tmp_path / "all.yaml"


def test_stages_hand_on_their_averages_and_resume_in_the_middle(staged, train, monkeypatch):
    overrides = ("train.steps=2", "init.train.steps=3", "teacher.batch.global=1")
    whole = train(staged, *overrides, to="whole")
    order = [(row["stage"], row["step"]) for row in rows(whole)]
    assert order == [("teacher", 1), ("teacher", 2), ("init", 1), ("init", 2), ("init", 3), ("dmd", 1), ("dmd", 2)]
    teacher, real = (
        weights(whole, "teacher"),
        load_file(whole.checkpoints("teacher") / "step_00000002" / "denoiser.ema.safetensors"),
    )
    assert_same({"denoiser.ema": real}, {"denoiser.ema": teacher["denoiser.ema"]})
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted, match="after step 3"):
            train(staged, *overrides, to="stopped")
    resumed = train(staged, *overrides, to="stopped", resume=True)
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    for stage in ("teacher", "init", "dmd"):
        assert_same(weights(resumed, stage), weights(whole, stage))


def test_stopped_in_the_middle_of_a_stage_its_rows_stay(staged, train, monkeypatch):
    overrides = ("train.steps=1", "init.train.steps=3")
    whole = train(staged, *overrides, to="whole")
    from sftk.runtime.step import TrainingStep

    plain = TrainingStep.__call__

    def fail(self, step):
        if self.recipe.phases[0].name == "init" and step == 2:
            raise RuntimeError("pulled the plug")
        return plain(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", fail)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(staged, *overrides, to="stopped")
    assert [row["step"] for row in rows(train(staged, *overrides, to="stopped", resume=True))] == [1, 2, 1, 2, 3, 1]
    assert (whole.root.parent / "stopped" / "metrics.jsonl").read_bytes() == whole.metrics.read_bytes()


NAN_GRAPH = """\
doc: Flow matching whose noise becomes NaN at one update.
inputs: [latents, prompt_embeds, key]
models: [denoiser]
params: {update: 3, sample: 1}
nodes:
  - {use: draw_timestep, in: {like: latents}, with: {per: sample}}
  - {use: draw_noise, in: {like: latents}, out: {noise: clean}}
  - {use: poison, in: {value: clean}, with: {update: $update, sample: $sample}, out: {poisoned: noise}}
  - {use: add_noise, in: {x0: latents}}
  - {use: flow_target, in: {x0: latents}}
  - {use: predict_flow}
  - {use: flow_matching_loss}
outputs: [loss, loss_weight]
"""
PLUGIN = """\
import torch

from sftk.core import transform


@transform(out="poisoned", kind="keyed")
def poison(key, value, *, update: int, sample: int):
    hit = torch.tensor([key.update == update and index == sample for index in key.samples], device=value.device)
    return torch.where(hit.reshape(-1, *[1] * (value.ndim - 1)), torch.nan, value)
"""


@pytest.mark.parametrize(("per_rank", "sample"), [(2, 1), (1, 0)])
@pytest.mark.usefixtures("nothing_stays_registered")
def test_nan_names_step_phase_key_and_checkpoint(staged, train, tmp_path, per_rank, sample):
    (tmp_path / "poison.py").write_text(PLUGIN)
    (tmp_path / "nan.yaml").write_text(NAN_GRAPH)
    text = (tmp_path / "teacher.yaml").read_text().replace("specs/flow_matching.yaml", f"nan.yaml, with: {{sample: {sample}}}")
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        text.replace("global: 2", f"global: 2, per_rank: {per_rank}").replace("version: 1", "version: 1\nplugins: [poison.py]")
    )
    with pytest.raises(NonFiniteError) as caught:
        train(recipe, "train.steps=9", "checkpoint.every=2")
    last = tmp_path / "run" / "checkpoints" / "bad" / "step_00000002"
    assert str(caught.value) == (
        "teacher/loss is not finite at step 4 of stage 'bad', phase 'teacher'; first seen in 'noise', written by 'poison'; "
        f"the last good checkpoint is {last}"
    )
    assert last_checkpoint(last.parent) == last
    assert all(tensor.isfinite().all() for file in weights(tmp_path / "run", "bad").values() for tensor in file.values())
    found = rows(tmp_path / "run")
    assert [row["teacher/loss"] == "nan" for row in found] == [False, False, False, True]


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.usefixtures("nothing_stays_registered")
def test_nan_on_the_command_line(staged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poison.py").write_text(PLUGIN)
    (tmp_path / "nan.yaml").write_text(NAN_GRAPH.replace("update: 3", "update: 0"))
    text = (tmp_path / "teacher.yaml").read_text().replace("specs/flow_matching.yaml", "nan.yaml")
    (tmp_path / "bad.yaml").write_text(text.replace("version: 1", "version: 1\nplugins: [poison.py]"))
    result = CliRunner().invoke(main, ["run", "bad.yaml", "--run-dir", "run"])
    assert result.exit_code == 1
    error = result.stderr
    assert error.startswith("error: teacher/loss is not finite at step 1 of stage 'bad', phase 'teacher'")
    assert error.rstrip().endswith("no checkpoint was saved before")
    assert "Traceback" not in error


@pytest.mark.usefixtures("nothing_stays_registered")
def test_nan_that_is_read_a_step_late_as_on_a_gpu(staged, train, tmp_path, monkeypatch):
    monkeypatch.setattr("sftk.runtime.stage.Meter", lambda device: Meter(torch.device("cuda")))
    (tmp_path / "poison.py").write_text(PLUGIN)
    (tmp_path / "nan.yaml").write_text(NAN_GRAPH)
    text = (tmp_path / "teacher.yaml").read_text().replace("specs/flow_matching.yaml", "nan.yaml")
    (tmp_path / "bad.yaml").write_text(text.replace("version: 1", "version: 1\nplugins: [poison.py]"))
    with pytest.raises(NonFiniteError, match=r"at step 4 of .*; first seen in 'noise', written by 'poison'; .*step_00000003$"):
        train(tmp_path / "bad.yaml", "train.steps=9", "checkpoint.every=3")
