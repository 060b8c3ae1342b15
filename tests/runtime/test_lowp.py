"""`lowp`: what computes in fp8, when its weights are rounded again, and what is refused."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from rounding_checks import fp8_linear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sftk.errors import ShapeError, SpecError
from sftk.functional.packed import pack, unpack
from sftk.models import WanModel, preset
from sftk.runtime import lowp
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.lowp import Fp8Linear, check_fp8, release_weights, use_fp8
from sftk.runtime.optim import make_optimizer
from sftk.runtime.parallelize import parallelize
from sftk.runtime.sample_options import role_sampling
from sftk.runtime.step import TrainingStep
from sftk.spec.lowp import LowpSection
from sftk.spec.optimizer import OptimizerSection
from sftk.spec.recipe import load_recipe

CPU = torch.device("cpu")
FP8 = "lowp.linears=fp8"
WIDE = "dim: 24, ffn_dim: 32, num_heads: 2", "dim: 32, ffn_dim: 32, num_heads: 2"


@pytest.fixture
def wide(tiny):
    """The tiny recipe with widths that fp8 takes, and random weights."""

    path = tiny()
    path.write_text(re.sub(r", weights: \S+}", "}", path.read_text().replace(*WIDE)))
    return path


def make(recipe, *overrides):
    (stage,) = load_recipe(recipe, overrides)
    built = build_stage(stage, CPU, {})
    torch.manual_seed(0)
    with torch.no_grad():
        for module in built.modules.values():
            for parameter in module.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    return stage, built, TrainingStep(stage.recipe, built, itertools.cycle(make_loader(stage.recipe)))


def layers(model: nn.Module) -> list[Fp8Linear]:
    return [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]


def random_model() -> WanModel:
    torch.manual_seed(0)
    model = WanModel(preset("digits"))
    with torch.no_grad():
        model.head.head.weight.normal_(std=0.02)
    return model


ARGUMENTS = (torch.randn(1, 3, 4, 8, 8), torch.full((1, 3), 500.0), torch.randn(1, 4, 32))


def test_products_are_those_of_the_rounded_factors():
    x, weight, bias = torch.randn(2, 5, 32), torch.randn(48, 32), torch.randn(48)
    found = fp8_linear(x, pack(weight, "fp8"), bias)
    rows = torch.stack([unpack(pack(token, "fp8")) for token in x.flatten(0, 1)]).view_as(x)
    columns = torch.stack([unpack(pack(row, "fp8")) for row in weight])
    torch.testing.assert_close(found, rows @ columns.T + bias)
    exact = x @ weight.T + bias
    assert 0.01 < (found - exact).norm() / exact.norm() < 0.05


def test_calls_with_gradient_are_as_they_were():
    plain, rounded = random_model(), use_fp8(random_model(), hold=True)
    assert plain.state_dict().keys() == rounded.state_dict().keys()
    one, other = plain(*ARGUMENTS)[0], rounded(*ARGUMENTS)[0]
    assert torch.equal(one, other)
    for a, b in zip(
        torch.autograd.grad(one.sum(), plain.parameters()), torch.autograd.grad(other.sum(), rounded.parameters()), strict=True
    ):
        assert torch.equal(a, b)
    assert all(layer.held is None for layer in layers(rounded))


@pytest.mark.parametrize("hold", [True, False])
def test_every_layer_of_the_blocks_is_rounded_in_calls_without(hold, monkeypatch):
    calls, inner = [], lowp.fp8_product
    monkeypatch.setattr(lowp, "fp8_product", lambda *arguments: (calls.append(1), inner(*arguments))[1])
    plain, model = random_model(), use_fp8(random_model(), hold=hold)
    with torch.no_grad():
        exact, found = plain(*ARGUMENTS)[0], model(*ARGUMENTS)[0]
    assert len(calls) == 10 * len(model.blocks)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.05
    assert all((layer.held is not None) == hold for layer in layers(model))


def test_weights_are_rounded_again_when_they_changed_and_only_then(monkeypatch):
    packed, inner = [], lowp.pack
    monkeypatch.setattr(lowp, "pack", lambda *arguments: (packed.append(1), inner(*arguments))[1])
    model = use_fp8(random_model(), hold=True)
    optimizer = make_optimizer(dict(model.named_parameters()), OptimizerSection(lr=1e-2))

    def sample():
        packed.clear()
        with torch.no_grad():
            return model(*ARGUMENTS)[0]

    first = sample()
    assert len(packed) == 40
    kept = [[part.data_ptr() for part in layer.parts(layer.held)] for layer in layers(model)]
    assert torch.equal(sample(), first)
    assert not packed
    model(*ARGUMENTS)[0].square().sum().backward()
    optimizer.step()
    second = sample()
    assert len(packed) == 40
    assert [[part.data_ptr() for part in layer.parts(layer.held)] for layer in layers(model)] == kept
    fresh = use_fp8(WanModel(preset("digits")), hold=True)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(*ARGUMENTS)[0], second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_a_call_on_a_gpu_casts_nothing_that_is_held(bias, held):
    """The operators of a call, traced with tensors of a GPU that nobody needs: what is not held is cast."""
    with FakeTensorMode():
        linear = nn.Linear(32, 48, bias=bias, device="meta")
        linear.weight = nn.Parameter(torch.empty(48, 32, device="cuda"))
        linear.bias = nn.Parameter(torch.empty(48, device="cuda")) if bias else None
        layer = Fp8Linear(linear)
        if held:
            layer.held = layer.make()
        x = torch.empty(2, 8, 32, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            nodes = make_fx(lambda x: layer(x))(x).graph.nodes
    called = [node.target for node in nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert called.count(aten._scaled_mm.default) == called.count(torch.ops.sftk.fp8_rows.default) == 1
    copies = {aten._to_copy.default, aten.clone.default, aten.copy_.default, aten.contiguous.default}
    assert bool(copies.intersection(called)) == (not held)


@pytest.mark.parametrize("released", [False, True])
def test_a_bias_that_changes_alone_is_followed(released):
    """What is held is a copy in the same memory, and never the parameter itself."""
    layer, x = Fp8Linear(nn.Linear(16, 32)), torch.ones(1, 16)
    layer.refresh()
    if released:
        layer.release()
    (_, kept), before = layer.held, layer.bias.detach().clone()
    assert kept.data_ptr() != layer.bias.data_ptr()
    with torch.no_grad():
        first = layer(x)
        layer.bias.add_(1)
        layer.refresh()
        assert layer.held[1] is kept
        torch.testing.assert_close(kept, before + 1)
        torch.testing.assert_close(layer(x), first + 1)


@pytest.mark.parametrize("checkpoint", ["none", "full"])
def test_compiled_blocks_give_the_same(checkpoint):
    model = use_fp8(random_model(), hold=True)
    with torch.no_grad():
        eager = model(*ARGUMENTS)[0]
    compiled = use_fp8(random_model(), hold=True)
    parallelize(compiled, checkpoint=checkpoint)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*ARGUMENTS)[0], eager, rtol=1e-4, atol=1e-5)
        for tensor in (*compiled.parameters(), *model.parameters()):
            tensor.mul_(1.1)
        torch.testing.assert_close(compiled(*ARGUMENTS)[0], model(*ARGUMENTS)[0], rtol=1e-4, atol=1e-5)
    compiled(*ARGUMENTS)[0].sum().backward()


def test_training_in_fp8_is_close_to_training_without(wide):
    found = {}
    for name, overrides in {"full": (), "fp8": (FP8,), "both": (FP8, "lowp.kv_cache=int8")}.items():
        stage, built, step = make(wide, *overrides)
        metrics = [step(index) for index in range(3)]
        found[name] = metrics
        rounded = {role for role, module in built.modules.items() if layers(module)}
        assert rounded == (set() if name == "full" else {"generator", "real_score", "fake_score"})
        kept = [node.options["kv_cache"] for node in starts(stage.graphs["critic"])]
        assert kept == ["int8" if name == "both" else "full"]
    for name in ("fp8", "both"):
        for one, other in zip(found["full"], found[name], strict=True):
            for key, value in one.items():
                assert other[key].item() == pytest.approx(value.item(), rel=0.1), (name, key)
                assert key != "generator/loss" or other[key].item() != value.item()


@pytest.mark.parametrize("extra", [(), (FP8,), ("precision=bf16", "phases.0.backward=replay")], ids=["alone", "both", "replay"])
def test_the_digits_recipe_trains_in_fp8(extra):
    """From the shipped weights: the first step differs by rounding alone, and weights move on."""
    small = ("latents.frames=6", "batch.global=1", "eval=null", *extra)
    found = {}
    for training in ("full", "fp8"):
        _, built, step = make("recipes/dmd.yaml", f"lowp.training={training}", *small)
        before = [p.detach().clone() for p in built.modules["generator"].blocks.parameters()]
        found[training] = [step(index) for index in range(2)]
        after = list(built.modules["generator"].blocks.parameters())
        assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 0.9 * len(before)
    for one, other in zip(found["full"], found["fp8"], strict=True):
        for key in ("generator/gradient_norm", "critic/loss"):
            assert one[key].isfinite()
            assert other[key].item() == pytest.approx(one[key].item(), rel=0.2), key
            assert other[key].item() != one[key].item(), key


def test_which_layers_a_recipe_gives(wide):
    """`training` and `linears` are independent, for the recipe and for a model; without `linears`, half copies stay."""
    kinds = {}
    for name, overrides in {
        "training": ("lowp.training=fp8",),
        "one": ("models.fake_score.lowp.training=fp8",),
        "half": ("lowp.training=fp8", "precision=bf16", "models.generator.half_copy=true"),
        "both": (FP8, "lowp.training=fp8", "models.generator.lowp.training=full", "models.real_score.lowp.linears=full"),
    }.items():
        _, built, _ = make(wide, *overrides)
        port = built.ports["generator"]
        with torch.no_grad():
            port(torch.randn(1, 3, 4, 8, 8), torch.zeros(1, 3), torch.zeros(1, 4, 32))
        first = {role: module.blocks[0].self_attn.q for role, module in built.modules.items()}
        kinds[name] = {
            role: (type(layer).__name__, getattr(layer, "trains_fp8", False), getattr(layer, "held", None) is not None)
            for role, layer in first.items()
        }
    half, plain, rounded = ("HalfLinear", True, False), ("Linear", False, False), ("Fp8Linear", True, False)
    roles = ("generator", "real_score", "fake_score")
    assert kinds["training"] == dict.fromkeys(roles, half)
    assert kinds["one"] == {"generator": plain, "real_score": plain, "fake_score": half}
    assert kinds["half"] == {"generator": ("HalfLinear", True, True), "real_score": half, "fake_score": half}
    assert kinds["both"] == {"generator": ("Fp8Linear", False, True), "real_score": half, "fake_score": rounded}


def test_both_give_one_result_with_gradient_and_without():
    model = use_fp8(random_model(), hold=True, lowp=LowpSection(linears="fp8", training="fp8"))
    with_gradient = model(*ARGUMENTS)[0]
    with torch.no_grad():
        assert torch.equal(model(*ARGUMENTS)[0], with_gradient)


def starts(graph):
    """Nodes that start a cache, in a graph and those within."""
    for node in graph.nodes:
        if node.op.name == "start_cache":
            yield node
        elif hasattr(node.op, "nodes"):
            yield from starts(node.op)


def test_a_teacher_that_is_never_differentiated_keeps_fp8_alone(wide):
    """Its weights take a byte each and a scale for each row; a score that SiD differentiates keeps its own, too."""
    found = {}
    for released in (True, False):
        graph = "phases.0.graph=specs/" + ("dmd" if released else "sid") + "_generator.yaml"
        _, built, step = make(wide, FP8, graph, "phases.0.log=[]")
        teacher = built.modules["real_score"]
        assert {layer.released for layer in layers(teacher)} == {released}
        assert not any(layer.released for role in ("generator", "fake_score") for layer in layers(built.modules[role]))
        found[released] = sum(parameter.numel() for parameter in teacher.blocks.parameters())
        assert step(0)["generator/loss"].isfinite()
        if released:
            port, arguments = built.ports["real_score"], (torch.randn(1, 3, 4, 8, 8), torch.zeros(1, 3), torch.zeros(1, 4, 32))
            with pytest.raises(ShapeError, match="in fp8 alone was called with gradient; set its linears: full"):
                port(*arguments)
    assert found[True] < 0.1 * found[False]


def test_released_weights_compute_the_same():
    kept, released = use_fp8(random_model(), hold=True), use_fp8(random_model(), hold=True)
    release_weights(released)
    with torch.no_grad():
        assert torch.equal(kept(*ARGUMENTS)[0], released(*ARGUMENTS)[0])


def test_a_model_says_otherwise_for_itself(wide):
    _, built, _ = make(wide, FP8, "models.generator.lowp.linears=full")
    assert {role: bool(layers(module)) for role, module in built.modules.items()} == {
        "generator": False, "real_score": True, "fake_score": True,
    }  # fmt: skip
    _, built, _ = make(wide, "models.real_score.lowp.linears=fp8")
    assert {role for role, module in built.modules.items() if layers(module)} == {"real_score"}


def test_an_average_that_is_called_computes_as_its_role(wide):
    average = "models.teacher={ema_of: generator}", "phases.0.models={real_score: teacher}", "ema.generator.start=0"
    _, built, step = make(wide, FP8, *average, "models.real_score.lowp.linears=full")
    assert layers(built.ports["teacher"].module)
    first = step(0)["generator/loss"]
    assert first.isfinite()


def test_the_student_is_sampled_with_the_cache_of_its_training(wide):
    (stage,) = load_recipe(wide, ["lowp.kv_cache=int8"])
    assert role_sampling(stage.document, stage.recipe, "generator").kv_cache == "int8"
    (stage,) = load_recipe(wide, ["lowp.kv_cache=int8", "phases.critic.with.kv_cache=full", "phases.0.with.kv_cache=full"])
    assert role_sampling(stage.document, stage.recipe, "generator").kv_cache == "full"


def test_widths_that_fp8_does_not_take(tiny):
    with pytest.raises(SpecError, match=r"widths that 16 divides, 'generator' has \{'dim': 24\} @ \$\.lowp\.linears"):
        load_recipe(tiny(), [FP8])
    with pytest.raises(SpecError, match=r"'fake_score' has \{'dim': 24\} @ \$\.models\.fake_score\.lowp"):
        load_recipe(tiny(), ["models.fake_score.lowp.linears=fp8"])
    with pytest.raises(SpecError, match=r"'generator' has \{'dim': 24\} @ \$\.lowp\.training.*; use training: full"):
        load_recipe(tiny(), ["lowp.training=fp8"])


def test_roles_without_layers_of_their_own(wide):
    with pytest.raises(SpecError, match="an average computes as its role does"):
        load_recipe(wide, ["models.teacher={ema_of: generator, lowp: {linears: fp8}}"])
    with pytest.raises(SpecError, match=r"lowp\.linears"):
        load_recipe(wide, ["lowp.linears=fp4"])


def test_a_gpu_without_fp8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    (stage,) = load_recipe("recipes/dmd.yaml", [FP8])
    with pytest.raises(SpecError, match=r"fp8, which NVIDIA A100 \(compute capability 8\.0\) does not do @ \$\.lowp\.linears"):
        check_fp8(stage.recipe, torch.device("cuda"))
    (trained,) = load_recipe("recipes/dmd.yaml", ["models.generator.lowp.training=fp8"])
    with pytest.raises(SpecError, match=r"generator would compute in fp8.* @ \$\.lowp\.training.* or training: full"):
        check_fp8(trained.recipe, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(stage.recipe, torch.device("cuda"))
