"""Benchmarks of whole recipes: which work is done, how it is counted, what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from sftk.cli import main
from sftk.errors import SpecError
from sftk.functional.exit_key import ExitKey
from sftk.runtime import bench_cases, bench_measure
from sftk.runtime.bench import BenchOptions, run_bench
from sftk.runtime.bench_cases import Cases, case_names, rollout_graph
from sftk.runtime.bench_count import count_cases
from sftk.runtime.bench_measure import MOST_COMPILING, measure
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.step import TrainingStep
from sftk.spec.recipe import load_recipe
from sftk.spec.variants import load_variants

CPU = torch.device("cpu")


def test_chosen_exit_steps_leave_tensors_as_they_are():
    one, two = (ExitKey(seed=1, phase="p", exit_index=index) for index in range(2))
    assert torch.equal(one.normal("noise", (3,)), two.normal("noise", (3,)))
    assert (one.integers("exit", 0, 2, 3), two.integers("exit", 0, 2, 1)) == ((0, 0, 0), (1,))
    assert ExitKey(seed=1, exit_index=9).integers("exit", 0, 4, 1) == (3,)


def test_cases_of_a_recipe(tiny):
    (stage,) = load_recipe(tiny())
    assert case_names(stage) == ("generator", "critic", "rollout", "forward", "forward_backward")
    with pytest.raises(SpecError, match=r"no case 'criti' to measure, only .*; did you mean 'critic'"):
        case_names(stage, ["criti"])


def test_counts_are_of_all_passes_of_an_update(tiny):
    counts = count_cases(load_recipe(tiny())[0], case_names(load_recipe(tiny())[0]))
    halves = count_cases(load_recipe(tiny(), ["batch.per_rank=1"])[0], ["critic", "forward"])
    assert list(counts) == [
        *(("generator", 0), ("generator", 1), ("critic", 0), ("critic", 1)),
        *((name, None) for name in ("rollout", "forward", "forward_backward")),
    ]
    assert halves["critic", 1].attention == counts["critic", 1].attention
    assert halves["forward", None].flops == counts["forward", None].flops / 2
    assert counts["forward_backward", None].attention == counts["forward", None].attention
    assert counts["forward_backward", None].attention_backward == 2.5 * counts["forward", None].attention
    assert counts["generator", 1].flops > counts["generator", 0].flops


def make_cases(path, *overrides):
    (stage,) = load_recipe(path, overrides)
    built = build_stage(stage, CPU, {})
    return stage, built, Cases(stage, built, *rollout_graph(stage))


def test_a_phase_is_what_a_training_step_runs(tiny):
    """At step 0 the drawn exit step, both phases: the same weights afterwards as a training step leaves."""
    _, built, cases = make_cases(tiny())
    (other,) = load_recipe(tiny())
    trained = build_stage(other, CPU, {})
    keys = []

    def note(**place):
        keys.append(ExitKey(exit_index=1, **place))
        return keys[-1]

    batch = next(iter(make_loader(other.recipe)))
    TrainingStep(other.recipe, trained, iter([batch, batch]), note)(0)
    for name in ("generator", "critic"):
        (case,) = cases.make(name, [1])
        case.run()
    assert [key.phase for key in keys] == ["generator", "critic"]
    for role in ("generator", "fake_score"):
        for name, weight in trained.modules[role].state_dict().items():
            assert torch.equal(weight, built.modules[role].state_dict()[name]), f"{role} {name}"


def test_other_cases_change_no_weights(tiny):
    _, built, cases = make_cases(tiny())
    before = {name: weight.clone() for name, weight in built.modules["generator"].state_dict().items()}
    for name in ("rollout", "forward", "forward_backward"):
        (case,) = cases.make(name, [None])
        case.run()
    assert all(torch.equal(weight, before[name]) for name, weight in built.modules["generator"].state_dict().items())
    assert all(parameter.grad is None for parameter in built.modules["generator"].parameters())


def test_a_phase_that_reads_another_is_measured_without_it(tiny, monkeypatch):
    shared = "{name: critic, update: fake_score, graph: specs/critic.yaml, in: {x0: generator.x0}"
    path = tiny(
        "every: 2\n    graph",
        "graph",
        "{name: critic, update: fake_score, graph: specs/score_critic.yaml, with: {steps: [1000, 500], shift: 3.0}",
        shared,
    )
    *_, cases = make_cases(path)
    ran = []
    plain = TrainingStep.run_turn
    monkeypatch.setattr(TrainingStep, "run_turn", lambda self, turn, *rest: (ran.append(turn.name), plain(self, turn, *rest)))
    (case,) = cases.make("critic", [None])
    case.run()
    case.run()
    assert ran == ["generator", "critic", "critic"]


def test_weights_that_start_at_zero_are_drawn(tiny):
    random = "weights: FOLDER/student.safetensors", "weights: null"
    _, built, _ = make_cases(tiny(*random))
    assert built.modules["generator"].head.head.weight.any()


def test_repeats_that_compile_are_not_counted():
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    sizes = iter([1, 1, 2, 2, 3, 3, 3])
    found = measure(lambda: compiled(torch.zeros(next(sizes))), CPU, warmup=1, repeats=3)
    assert len(found.seconds) == 3
    assert found.graphs == 3
    assert not found.compiling
    sizes = iter(range(4, 99))
    found = measure(lambda: compiled(torch.zeros(next(sizes))), CPU, warmup=0, repeats=2)
    assert (len(found.seconds), found.compiling) == (2, True)
    assert next(sizes) == 4 + MOST_COMPILING + 2
    torch.compiler.reset()


def test_long_calls_are_repeated_less(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench_measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call():
        clock[0] += 2.0

    assert measure(call, CPU, warmup=3, repeats=9, most_seconds=3.0).seconds == (2.0, 2.0)
    assert measure(call, CPU, warmup=0, repeats=9, most_seconds=1.0).seconds == (2.0,)


def test_one_failure_stops_nothing_else(tiny, tmp_path, monkeypatch):
    listed = tmp_path / "variants.yaml"
    listed.write_text(
        "- {name: plain}\n- {name: flash, with: {models.fake_score.backend: flash}}\n- {name: missing, with: {seed: 4}}\n"
    )
    build = bench_cases.make_loader

    def refuse(recipe, path):
        if recipe.seed == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return build(recipe, path)

    monkeypatch.setattr(bench_cases, "make_loader", refuse)
    saved = []
    options = BenchOptions(only=("critic", "rollout"), repeats=1, warmup=0)
    report = run_bench(
        load_variants(tiny(), ["latents.frames=3"], listed), options, save=lambda found: saved.append(json.dumps(found))
    )
    plain, flash, missing = report["variants"]
    assert [row.get("error") for row in plain["rows"]] == [None] * 3
    critics, rollout = flash["rows"][:2], flash["rows"][2]
    assert all(row["error"].startswith("SpecError: the attention backend 'flash' needs bf16") for row in critics)
    assert rollout["seconds"] > 0
    assert missing["error"] == "OutOfMemoryError: CUDA out of memory."
    assert [row["case"] for row in plain["summary"]] == ["critic"]  # no cycle without the generator
    assert plain["summary"][0]["tflop"] == pytest.approx(sum(row["tflop"] for row in plain["rows"][:2]) / 2)
    assert plain["rows"][2]["pictures"] == 2 * 3
    assert json.loads(saved[-1]) == json.loads(json.dumps(report))
    assert len(json.loads(saved[0])["variants"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, with: {sed: 1}}\n", "variant 'a': unknown key 'sed'"),
        ("- {name: a}\n- {name: a}\n", "two variants are called 'a'"),
        ("[]\n", "the list of variants is empty"),
        ("- {name: a b}\n", "a name is made of letters"),
        ("- {nam: a}\n", "unknown key 'nam'"),
    ],
)
def test_mistakes_in_variants(tiny, tmp_path, text, message):
    listed = tmp_path / "variants.yaml"
    listed.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_variants(tiny(), [], listed)


def test_the_command(tiny, tmp_path):
    run, path, file = CliRunner(), str(tiny()), tmp_path / "one.json"
    options = ["--only", "critic,forward,steps", "--exit-step", "1", "--steps", "2", "--profile", str(tmp_path / "traces")]
    first = run.invoke(main, ["bench", path, *options, "--json", str(file)])
    assert first.exit_code == 0, first.output
    (variant,) = json.loads(file.read_text())["variants"]
    assert [(row["case"], row["exit_step"], row["repeats"]) for row in variant["rows"]] == [
        ("critic", 1, 2),
        ("forward", None, 2),
        ("steps", None, 2),
    ]
    assert all(Path(profile["trace"]).stat().st_size for profile in variant["profiles"])
    again = run.invoke(main, ["bench", path, "--only", "forward", "--steps", "1", "--against", str(file)])
    assert again.exit_code == 0, again.output
    line = next(line for line in again.output.splitlines() if line.strip().startswith("forward"))
    assert f"{variant['rows'][1]['seconds']:.4g}, " in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "rolout"], 2, "did you mean 'rollout'"),
        (["--against", "CHANGELOG.md"], 1, "cannot read the report"),
        (["--exit-step", "a"], 2, "expected numbers with commas between"),
        (["precision=bf61"], 2, "precision"),
    ],
)
def test_mistakes_on_the_command_line(arguments, code, message):
    found = CliRunner().invoke(main, ["bench", *arguments])
    assert (found.exit_code, message in found.output) == (code, True), found.output


def test_an_exit_step_that_does_not_exist(tiny):
    found = CliRunner().invoke(main, ["bench", str(tiny()), "--only", "critic", "--exit-step", "2"])
    assert found.exit_code == 1
    assert "has the exit steps [0, 1], found [2] in --exit-step" in found.output
