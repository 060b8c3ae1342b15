"""A training step on meta tensors: nothing is loaded or computed, what would fail is said."""

from __future__ import annotations

import pytest

from sftk.core.transform import transform
from sftk.errors import SpecError
from sftk.models.config import preset
from sftk.models.wan import WanModel
from sftk.runtime import shapes
from sftk.runtime.shapes import check_shapes
from sftk.spec.recipe import load_recipe


def test_shapes_and_sizes(tiny):
    (stage,) = load_recipe(tiny())
    generator, critic = check_shapes(stage)
    assert generator.outputs["x0"] == critic.outputs["x0"] == "float32 [2, 6, 4, 8, 8]"
    assert generator.outputs["loss"] == "float32 []"
    config = stage.recipe.models["generator"].config
    assert generator.parameters == {"generator": sum(p.numel() for p in WanModel(config).parameters())}
    assert critic.parameters.keys() == {"fake_score"}


def test_accumulation_checks_a_micro_batch(tiny):
    (stage,) = load_recipe(tiny(), ["batch.global=6", "batch.per_rank=3"])
    assert check_shapes(stage)[0].outputs["x0"] == "float32 [3, 6, 4, 8, 8]"


def test_no_weight_is_read_or_made(tiny, monkeypatch):
    from sftk.models import weights

    def refuse(*_, **__):
        raise AssertionError("a weight was read")

    for name in ("read_tensors", "load_weights", "build_model"):
        monkeypatch.setattr(weights, name, refuse)
    (stage,) = load_recipe(tiny("size: SIZE, weights", "size: SIZE, dtype: bf16, weights"), ["precision=bf16"])
    assert len(check_shapes(stage)) == 2


def test_a_model_of_the_published_size_costs_nothing(tiny):
    sizes = {name: getattr(preset("1.3b"), name) for name in ("dim", "ffn_dim", "num_heads", "num_layers")}
    text = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    size = f"models.fake_score.size={{{text}, in_dim: 4, out_dim: 4, text_dim: 32, text_len: 4}}"
    (stage,) = load_recipe(tiny("latents: {frames: 6", "latents: {frames: 3"), [size])
    assert check_shapes(stage)[1].parameters["fake_score"] > 1e9


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ZeroDivisionError])
def test_a_phase_that_fails_is_named(tiny, tmp_path, nothing_stays_registered, error):
    @transform(out="target", kind="per_sample")
    def fail_for_shapes(x0):
        raise error("it does not fit")

    (tmp_path / "bad.yaml").write_text(
        "doc: x\ninputs: [latents]\nmodels: []\nnodes:\n  - {use: fail_for_shapes, in: {x0: latents}, out: {target: loss}}\n"
        "  - {use: flow_target, in: {x0: latents, noise: loss}, out: {target: loss_weight}}\noutputs: [loss, loss_weight]\n"
    )
    (stage,) = load_recipe(tiny("graph: specs/score_critic.yaml, with: {steps: [1000, 500], shift: 3.0}", "graph: bad.yaml"))
    with pytest.raises(
        SpecError, match=r"the phase 'critic' fails on meta tensors: .*it does not fit.* @ \$.phases\[1\] \(.*tiny.yaml:\d+\)"
    ):
        check_shapes(stage)


def test_phases_that_read_one_another(tiny, tmp_path):
    (stage,) = load_recipe(
        tiny("shift: 3.0}, clip: 1.0}", "shift: 3.0}, clip: 1.0, every: 2, in: {initial_latents: generator.x0}}")
    )
    assert check_shapes(stage)[1].outputs["x0"] == "float32 [2, 12, 4, 8, 8]"
    assert shapes.PhaseShapes.__doc__


def test_objectives_on_long_rollouts_fit_together():
    """The generators and critics of SiD and of a GAN that judge a window; those of DMD have a recipe."""
    window = "{steps: [1000, 500], shift: 3.0, window: 6, judged_frames: 6, grad_frames: 3}"
    long = ["latents.frames=12", "models.codec={codec: digits}", "batch.global=2", "batch.per_rank=2"]
    phases = {"sid": ("generator", "critic"), "gan": ("generator", "discriminator")}
    graphs = {"sid": ("sid_generator_long", "score_critic_long"), "gan": ("gan_generator_long", "gan_discriminator_long")}
    for name, (first, second) in phases.items():
        given = [f"phases.{phase}.graph=specs/{graph}.yaml" for phase, graph in zip((first, second), graphs[name], strict=True)]
        given += [f"phases.{phase}.with={window}" for phase in (first, second)]
        (stage,) = load_recipe(f"recipes/digits/{name}.yaml", [*long, *given])
        for found in check_shapes(stage):
            assert found.outputs["x0"] == "float32 [2, 6, 4, 8, 8]"
