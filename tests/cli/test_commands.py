"""The commands on the shipped recipe, made small: what they write, print and return."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import av
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sftk
from sftk.cli import main
from sftk.models import preset
from sftk.spec.recipe import load_recipe

SMALL = (
    "device=cpu",
    "train.steps=2",
    "batch.global=2",
    "checkpoint.every=1",
    "ema.generator.start=0",
    "phases.generator.every=2",
    "eval.with.clips=4",
    "eval.with.batch=4",
    "eval.with.late_frames=24",
    "eval.with.sample_prompts=2",
    "eval.with.teacher_sampling.steps=2",
)
METRICS = {"digit_accuracy", "direction_accuracy", "frechet"}


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of `recipes/dmd.yaml` from an empty working directory: its folder and what was printed."""
    here, before = tmp_path_factory.mktemp("cwd"), os.getcwd()
    os.chdir(here)
    try:
        result = invoke("run", "recipes/dmd.yaml", *SMALL)
    finally:
        os.chdir(before)
    assert result.exit_code == 0, (result.output, result.exception)
    (run,) = (here / "runs" / "dmd").iterdir()
    return run, result.output


def test_the_run_is_named_by_recipe_and_time(finished):
    run, output = finished
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    assert output.rstrip().endswith(f"finished: runs/dmd/{run.name}/report.html")
    after = json.loads((run / "summary.json").read_text())["student_after"]
    (shown,) = re.findall("^student after (.*)", output, re.MULTILINE)
    assert [float(cell) for cell in shown.split()[:2]] == pytest.approx([after[name] for name in sorted(METRICS)[:2]], abs=1e-3)
    assert {path.name for path in run.iterdir()} >= {
        "checkpoints", "metrics.jsonl", "recipe.yaml", "report.html", "samples", "summary.json", "tensorboard",
    }  # fmt: skip


def test_the_resolved_recipe_gives_the_same_run(finished, monkeypatch, tmp_path):
    run, _ = finished
    monkeypatch.chdir(tmp_path)
    (again,), (first,) = load_recipe(run / "recipe.yaml"), load_recipe("recipes/dmd.yaml", SMALL)
    assert again.recipe == first.recipe
    result = invoke("run", run / "recipe.yaml", "eval.enabled=false", "--run-dir", "again")
    assert result.exit_code == 0, result.output
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "again")
    ]
    assert [row | {"stage": ""} for row in rows[0]] == [row | {"stage": ""} for row in rows[1]]


def test_metrics(finished):
    run, _ = finished
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("dmd", 1), ("dmd", 2)]
    critic, generator = (
        {"critic/loss", "critic/grad_norm"},
        {"generator/loss", "generator/grad_norm", "generator/gradient_norm"},
    )
    assert [set(row) - {"stage", "step"} for row in rows] == [critic | generator, critic]
    assert all(0 < row["critic/loss"] < 10 for row in rows)


def test_summary(finished):
    run, _ = finished
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["recipe"], summary["seed"], summary["steps"], summary["sftk"]) == ("dmd", 0, {"dmd": 2}, sftk.__version__)
    for name in ("real", "teacher", "student_before", "student_after"):
        row = summary[name]
        assert row.keys() >= METRICS
        assert 0 <= row["digit_accuracy"] <= 1
        if name != "teacher":
            assert row["late"].keys() >= METRICS
    assert "late" not in summary["teacher"]
    assert summary["evaluation"]["clips"] == 4
    assert summary["seconds"].keys() >= {"train dmd", "evaluate"}


def test_tensorboard(finished):
    run, _ = finished
    events = EventAccumulator(str(run / "tensorboard" / "dmd"))
    events.Reload()
    assert {event.step for event in events.Scalars("critic/loss")} == {1, 2}
    assert [event.step for event in events.Scalars("generator/loss")] == [1]
    assert set(events.Tags()["images"]) == {"samples/student", "samples/teacher"}


def test_samples_and_report(finished):
    run, _ = finished
    with Image.open(run / "samples" / "side_by_side.gif") as gif:
        assert gif.n_frames == 21
    with av.open(str(run / "samples" / "side_by_side.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 21
    with Image.open(run / "samples" / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 100
    report = (run / "report.html").read_text()
    assert "data:image/gif;base64," in report or "data:video/mp4;base64," in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_checkpoints(finished):
    run, _ = finished
    folders = sorted((run / "checkpoints" / "dmd").iterdir())
    assert [folder.name for folder in folders] == ["step_00000001", "step_00000002"]
    names = ("fake_score", "fake_score.optimizer", "generator", "generator.ema", "generator.optimizer")
    files = {f"{name}.safetensors" for name in names} | {"checkpoint.json"}
    assert {path.name for path in folders[-1].iterdir()} == files
    weights = load_file(folders[-1] / "generator.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) > 600_000
    assert json.loads((folders[-1] / "checkpoint.json").read_text())["step"] == 2


@pytest.mark.parametrize("frames", [21, 6])
def test_sample_writes_a_video(finished, tmp_path, frames):
    run, _ = finished
    options = () if frames == 21 else ("--frames", frames)
    result = invoke("sample", run, "--prompt", "a 3 moving left", "--out", tmp_path / "deep" / "out.mp4", *options)
    assert result.exit_code == 0, result.output
    assert f"a 3 moving left ({frames} frames, seed 0, " in result.output
    assert "generator.ema.safetensors" in result.output
    with av.open(str(tmp_path / "deep" / "out.mp4")) as video:
        decoded = [frame.to_ndarray(format="gray") for frame in video.decode(video=0)]
    assert len(decoded) == frames
    assert max(frame.max() for frame in decoded) > 150


def test_sample_several_prompts_seeds_and_formats(finished, tmp_path):
    run, _ = finished
    prompts = ("--prompt", "a 3 moving left", "--prompt", "an 8 moving up")
    short = ("--frames", 3)
    checkpoint = run / "checkpoints" / "dmd" / "step_00000001"
    result = invoke("sample", checkpoint, *prompts[:2], "--prompt", "a 8 moving up", "--out", tmp_path / "v.gif", *short)
    assert result.exit_code == 0, result.output
    assert "step_00000001" in result.output
    with Image.open(tmp_path / "v_1.gif") as gif:
        assert gif.n_frames == 3
    one = checkpoint / "generator.safetensors"
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert invoke("sample", one, *prompts[:2], "--out", tmp_path / f"{name}.png", "--seed", seed, *short).exit_code == 0
    same, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert same == again
    assert same != other


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("sample", "nowhere", "--prompt", "x"), 1, "error: no such checkpoint nowhere; expected a run's folder"),
        (("sample", "RUN", "--prompt", "a 3 moving left", "--out", "x.avi"), 1, "error: cannot write 'x.avi'"),
        (("sample", "RUN", "--prompt", "a 3 moving left", "--frames", "4"), 1, "4 frames do not divide into blocks of 3"),
        (("sample", "RUN", "--prompt", "a cat"), 1, "error: "),
        (("sample", "RUN", "--prompt", "a 3 moving left", "--role", "generatr"), 1, "did you mean 'generator'?"),
        (("sample", "RUN"), 2, "nothing to show: give --prompt TEXT or --prompts FILE"),
        (("sample", "RUN", "--prompt", "a 3 moving left", "sampling.windw=3"), 2, "did you mean 'window'?"),
        (("export", "RUN", "x.safetensors", "--dtype", "int4"), 2, "'int4' is not one of"),
        (
            ("run", "recipes/dmd.yaml", "--run-dir", "RUN"),
            1,
            "holds a run already; add --resume to go on with it, or take another --run-dir",
        ),
        (("run", "recipes/dmd.yaml", "train.steps=two", "--run-dir", "x"), 2, "$.train.steps (override 'train.steps=two')"),
        (("show", "recipes/dmd.yaml", "--phase", "critc"), 2, "has no phase 'critc'; did you mean 'critic'?"),
        (("train",), 2, "No such command 'train'"),
    ],
)
def test_mistakes_end_with_a_message(finished, monkeypatch, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*(finished[0] if argument == "RUN" else argument for argument in arguments))
    assert result.exit_code == code, (result.output, result.exception)
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_export(finished, tmp_path):
    run, _ = finished
    result = invoke("export", run, tmp_path / "out" / "student.safetensors", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    exported = load_file(tmp_path / "out" / "student.safetensors")
    average = load_file(run / "checkpoints" / "dmd" / "step_00000002" / "generator.ema.safetensors")
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in average.items())
    critic = invoke("export", run, tmp_path / "critic.safetensors", "--role", "fake_score")
    assert critic.exit_code == 0
    wanted = load_file(run / "checkpoints" / "dmd" / "step_00000002" / "fake_score.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(tmp_path / "critic.safetensors").items())


def test_export_the_last_weights_and_other_weights(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    saved = run / "checkpoints" / "dmd" / "step_00000002"
    last = load_file(saved / "generator.safetensors")
    average = {name: tensor * 2 for name, tensor in last.items()}
    save_file(average, saved / "generator.ema.safetensors", metadata={"config": json.dumps(attrs.asdict(preset("digits")))})
    for name, options, wanted in (("last", ("--last",), last), ("average", (), average)):
        assert invoke("export", run, tmp_path / f"{name}.safetensors", *options).exit_code == 0
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    refused = invoke("export", run, tmp_path / "out", "--format", "diffusers")
    assert refused.exit_code == 1
    assert "the diffusers format has no place for rope_base 100; take --format sftk" in refused.output
    one = invoke("export", saved / "generator.safetensors", tmp_path / "x", "--role", "generator")
    assert "is no run or checkpoint, so it has no role 'generator'" in one.output


def test_export_from_one_format_to_another(make_model, tmp_path):
    from sftk.models.formats import open_weights

    model = make_model(torch.float32, dim=256, num_heads=2, text_len=512)
    torch.save({"generator_ema": {f"model.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "m.pt")
    result = invoke(
        "export", f"{tmp_path / 'm.pt'}:generator_ema", tmp_path / "hf", "--format", "diffusers", "--shard-size", 0.002
    )
    assert result.exit_code == 0, result.output
    assert "in the diffusers format as it is" in result.output
    result = invoke("export", tmp_path / "hf", tmp_path / "wan", "--format", "original", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    source = open_weights(tmp_path / "wan")
    assert source.config() == model.config
    state = model.state_dict()
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in source.tensors())


def test_sample_with_weights_of_another_place(finished, tmp_path):
    run, _ = finished
    saved = run / "checkpoints" / "dmd" / "step_00000002"
    state = load_file(saved / "generator.ema.safetensors")
    torch.save({"generator_ema": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "m.pt")
    prompt = ("--prompt", "a 3 moving left", "--frames", 3)
    for name, start in (
        ("run", (run,)),
        ("weights", (run, "--weights", tmp_path / "m.pt")),
        ("recipe", ("recipes/dmd.yaml", "--weights", f"{tmp_path / 'm.pt'}:generator_ema")),
        ("teacher", (run, "--weights", Path(sftk.__file__).parent / "assets" / "digits" / "teacher.safetensors")),
    ):
        result = invoke("sample", *start, *prompt, "--out", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.output
    videos = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("run", "weights", "recipe", "teacher")}
    assert videos["run"] == videos["weights"] == videos["recipe"]
    assert videos["run"] != videos["teacher"]
    result = invoke("sample", run, *prompt, "--weights", f"{tmp_path / 'm.pt'}:critic", "--out", tmp_path / "x.png")
    assert "has no entry 'critic' of tensors, but the entries generator_ema" in result.output


def test_without_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(
        "run",
        "recipes/dmd.yaml",
        "train.steps=1",
        "batch.global=1",
        "eval.enabled=false",
        "track.tensorboard=false",
        "--run-dir",
        "here",
    )
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert not {"real", "teacher", "student_before", "student_after"} & summary.keys()
    assert not (tmp_path / "here" / "samples").exists()
    assert not (tmp_path / "here" / "tensorboard").exists()
    assert (tmp_path / "here" / "report.html").is_file()


def test_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("show", "recipes/dmd.yaml")
    assert result.exit_code == 0
    assert [line for line in result.output.splitlines() if line in ("generator", "critic")] == ["generator", "critic"]
    assert "dmd_gradient" in result.output
    only = invoke("show", "recipes/dmd.yaml", "--phase", "critic", "--mermaid").output
    assert only.startswith("%% critic\nflowchart")
    assert "dmd_gradient" not in only
    assert "plan_rollout" in invoke("show", "specs/rollout.yaml").output
    assert "{scale: 2.5," in invoke("show", "specs/scores.yaml", "guidance=2.5").output
    wrong = invoke("show", "specs/scores.yaml", "guidanse=2.5")
    assert (wrong.exit_code, "has no parameter 'guidanse'" in wrong.output) == (2, True)


@pytest.mark.parametrize("name", ["digits/study", "study.yaml"])
def test_a_recipe_without_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'recipes/digits/study.yaml'?" in invoke("check", name).output


def test_several_recipes_are_checked_in_one_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = invoke("check", "recipes/dmd.yaml", "recipes/digits/sid.yaml", "train.steps=7")
    assert (both.exit_code, both.stderr) == (0, "")
    assert [line.partition(":")[0] for line in both.output.splitlines()] == ["dmd", "sid"]
    one_wrong = invoke("check", "recipes/nowhere.yaml", "recipes/dmd.yaml")
    assert one_wrong.exit_code == 2
    assert one_wrong.stdout.startswith("dmd: ok: ")
    assert one_wrong.stderr.startswith("recipes/nowhere.yaml: error: 1 problem\n  no such file 'recipes/nowhere.yaml'")
    assert one_wrong.stderr.endswith("1 of 2 recipes failed: recipes/nowhere.yaml\n")
    wrong = invoke("check", "recipes/dmd.yaml", "recipes/digits/sid.yaml", "phases.critic.evry=1")
    assert (wrong.exit_code, wrong.stderr.count("unknown key 'evry'")) == (2, 2)


def test_what_the_system_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = invoke("run", "recipes/dmd.yaml", "--run-dir", "file/run")
    assert (result.exit_code, result.stderr) == (1, "error: file/run: not a directory\n")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sftk.runtime.rundir.os.replace", full)
    result = invoke("run", "recipes/dmd.yaml", "--run-dir", "run")
    assert result.exit_code == 1
    assert result.stderr == "error: run/recipe.yaml: no space left on device; make room; a run then goes on with --resume\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_out_of_memory(tmp_path, monkeypatch):
    def out(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("sftk.runtime.run.run_recipe", out)
    result = invoke("run", "recipes/dmd.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: CUDA out of memory. Tried to allocate 2 GiB.\n`sftk plan` says")


def test_help_and_version():
    assert invoke("--version").output == f"sftk, version {sftk.__version__}\n"
    help_text = invoke("--help").output
    for name in ("run", "check", "show", "sample", "export"):
        assert re.search(rf"^  {name} +\S", help_text, re.MULTILINE)
        result = invoke(name, "-h")
        assert result.exit_code == 0
        assert result.output.startswith(f"Usage: main {name} ")


def test_in_a_process_of_its_own(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sftk",
        "run",
        "recipes/dmd.yaml",
        "train.steps=1",
        "batch.global=1",
        "eval.enabled=false",
        "--run-dir",
        "here",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "here" / "report.html").is_file()


def test_ctrl_c_outside_training_is_130_too(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sftk.runtime.run.load_recipe", interrupt)
    result = invoke("run", "recipes/dmd.yaml")
    assert result.exit_code == 130
    assert "stopped by SIGINT" in result.output
