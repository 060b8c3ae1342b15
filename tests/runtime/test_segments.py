"""Compiled stretches between model calls: what is compiled, and that it changes nothing."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

from sftk.core.graph import Graph
from sftk.functional import add_noise, flow_target
from sftk.functional.keys import Key
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.segments import Segment, compile_segments
from sftk.runtime.step import TrainingStep
from sftk.spec.graphs import load_graph
from sftk.spec.recipe import load_recipe

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile on a CPU needs a C++ compiler"
)


pytestmark = [  # of torch's own code while it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    import torch._dynamo

    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(config, name) for name in names}
    torch._dynamo.reset()
    yield
    for name, value in before.items():
        setattr(config, name, value)
    torch._dynamo.reset()


def segments(graph):
    found = []
    for node in graph.nodes:
        if isinstance(node.op, Segment):
            found.append([inner.op.name for inner in node.op.nodes])
        elif hasattr(node.op, "nodes"):
            found += segments(node.op)
    return found


def test_draws_and_models_stay_outside():
    graph = load_graph("specs/flow_matching.yaml")
    compiled = compile_segments(graph, "eager")
    assert segments(compiled) == [["add_noise", "flow_target"], ["flow_matching_loss"]]
    assert [node.op.name for node in graph.nodes] == [
        "draw_timestep", "draw_noise", "add_noise", "flow_target", "drop_condition", "predict_flow", "flow_matching_loss",
    ]  # fmt: skip
    assert compiled.outputs == graph.outputs
    assert segments(compile_segments(load_graph("specs/dmd_generator.yaml"), "eager"))[-1][0] == "dmd_gradient"


def test_no_grad_survives():
    graph = Graph([add_noise.node(grad=False), flow_target], inputs=("x0", "noise", "timestep"))
    values = {name: torch.ones(1, 3, 4, 2, 2, requires_grad=True) for name in ("x0", "noise")} | {"timestep": torch.ones(1, 3)}
    out = compile_segments(graph, "eager").run(values, {})
    assert (out["noisy"].requires_grad, out["target"].requires_grad) == (False, True)


def test_an_optional_input_may_be_absent():
    from sftk.objectives import dmd_gradient

    graph = Graph([dmd_gradient], inputs=("x0", "fake_x0", "real_x0"), optional=("gradient_mask",))
    values = {
        name: torch.randn(1, 3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(graph.inputs)
    }
    compiled = compile_segments(graph, "aot_eager")
    mask = torch.tensor([[True, False, True]])
    for given in (values, values | {"gradient_mask": mask}):
        wanted, found = graph.run(given, {}), compiled.run(given, {})
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize("spec", ["flow_matching", "dmd_generator", "score_critic"])
def test_aot_eager_equals_eager_bit_for_bit(spec, make_model):
    graph = load_graph(f"specs/{spec}.yaml", {"steps": (1000, 500)} if spec != "flow_matching" else {})
    ports = {port: make_model(torch.float32, seed=index) for index, port in enumerate(graph.ports)}
    randn = torch.Generator().manual_seed(0)
    values = {
        "latents": torch.randn(2, 6, 4, 4, 4, generator=randn),
        "noise": torch.randn(2, 6, 4, 4, 4, generator=randn),
        "prompt_embeds": torch.randn(2, 4, 8, generator=randn),
        "negative_embeds": torch.zeros(2, 4, 8),
        "key": Key(seed=1, samples=(0, 1)),
    }

    def run(made):
        for port in ports.values():
            port.zero_grad()
        out = made.run({key: values[key] for key in made.inputs}, ports)
        out["loss"].backward()
        gradients = [p.grad.clone() for port in ports.values() for p in port.parameters() if p.grad is not None]
        return {key: value.detach() for key, value in out.items()}, gradients

    (plain, gradients), (compiled, same) = run(graph), run(compile_segments(graph, "aot_eager"))
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[key], compiled[key]) for key in plain)
    assert len(gradients) > 20
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))


def losses(recipe, *overrides, steps=2):
    (stage,) = load_recipe(recipe, overrides)
    built = build_stage(stage, torch.device("cpu"), {})
    step = TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe)))
    return built, [{name: value.item() for name, value in step(index).items()} for index in range(steps)]


def test_compile_auto_is_off_on_a_cpu(tiny):
    built, _ = losses(tiny(), steps=0)
    assert not any(segments(graph) for graph in built.graphs.values())


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny):
    _, eager = losses(tiny())
    built, compiled = losses(tiny(), "compile=true")
    assert all(segments(graph) for graph in built.graphs.values())
    for one, other in zip(eager, compiled, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.fixture
def flow_matching(tiny, tmp_path):
    model = tiny().read_text().split("generator: ")[1].split("\n")[0]
    path = tmp_path / "plain.yaml"
    path.write_text(
        "version: 1\nlatents: {frames: 3, channels: 4, height: 8, width: 8}\ndata: {use: digits}\n"
        f"models: {{denoiser: {model}}}\n"
        "optimizers: {denoiser: {lr: 1e-3}}\n"
        "phases: [{name: teacher, update: denoiser, graph: specs/flow_matching.yaml}]\ntrain: {steps: 2}\nbatch: {global: 2}\n"
    )
    return path


def test_a_flow_matching_step_of_compiled_blocks_and_segments(flow_matching, monkeypatch):
    """With the gradients of aot_eager, which needs no C++ compiler; Inductor's are slow tests."""
    monkeypatch.setattr("sftk.runtime.build.compile_segments", functools.partial(compile_segments, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    _, eager = losses(flow_matching)
    built, compiled = losses(flow_matching, "compile=true")
    assert all(segments(graph) for graph in built.graphs.values())
    assert all(block._compiled_call_impl is not None for block in built.modules["denoiser"].blocks)
    assert [step["teacher/loss"] for step in compiled] == pytest.approx([step["teacher/loss"] for step in eager], rel=1e-6)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_flow_matching_step(flow_matching):
    _, eager = losses(flow_matching)
    _, compiled = losses(flow_matching, "compile=true")
    assert [step["teacher/loss"] for step in compiled] == pytest.approx([step["teacher/loss"] for step in eager], rel=1e-4)
