"""Every digits recipe that trains: two real steps, gradients where they belong, and the parts that methods share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sftk.core.graph import Graph
from sftk.runtime.build import build_stage
from sftk.runtime.loader import make_loader
from sftk.runtime.prepare import prepare_data
from sftk.runtime.progress import TrainingProgress
from sftk.runtime.stage import StageRun
from sftk.runtime.step import TrainingStep
from sftk.spec.files import find_file
from sftk.spec.recipe import load_recipe

CPU = torch.device("cpu")
FEW = ("device=cpu", "batch.global=2", "data.workers=0", "compile=false")
MORE = {
    "ode": ("data.with.path={folder}/pairs", "data.with.count=3", "data.with.solver.steps=8", "data.with.batch=3"),
}
RECIPES = sorted(
    path.stem for path in find_file("recipes/digits/tf.yaml").parent.glob("*.yaml") if "phases:" in path.read_text()
)
WINDOW = "{steps: [1000, 500], shift: 3.0, window: 6, min_frames: 6, judged_frames: 6"
LONG = {
    "sid": {"generator": "sid_generator_long", "critic": "score_critic_long"},
    "gan": {"generator": "gan_generator_long", "discriminator": "gan_discriminator_long"},
}
"""Methods on long rollouts that no recipe of the digits has: each phase's graph."""
PENALTIES = ", relativistic: true, r1_weight: 0.1, r1_sigma: 0.05, r2_weight: 0.1, r2_sigma: 0.05"


def long_rollouts(name: str) -> list[str]:
    """Overrides that make a method judge the last 6 frames of rollouts of 12."""
    made = ["latents.frames=12", "models.codec={codec: digits}"]
    for phase, graph in LONG[name].items():
        own = {"generator": ", grad_frames: 3", "discriminator": PENALTIES}.get(phase, "")
        made += [f"phases.{phase}.graph=specs/{graph}.yaml", f"phases.{phase}.with={WINDOW}{own}}}"]
    return made


def everything(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("name", "long"), [*((name, False) for name in RECIPES), *((name, True) for name in LONG)])
def test_two_steps_move_what_is_updated_and_nothing_else(name, long, tmp_path):
    overrides = [text.format(folder=tmp_path) for text in MORE.get(name, ())] + (long_rollouts(name) if long else [])
    (stage,) = load_recipe(f"recipes/digits/{name}.yaml", [*FEW, *overrides])
    prepare_data(stage, TrainingProgress(enabled=False))
    built = build_stage(stage, CPU, {})
    step = TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe, stage.path)))
    before = {role: everything(module) for role, module in built.modules.items()}
    for index in range(2):
        metrics = step(index)
        assert metrics
        assert all(value.isfinite() for value in metrics.values()), metrics
        norms = [value for key, value in metrics.items() if "/grad_norm" in key]
        assert norms
        assert all(value > 0 for value in norms), metrics
    updated = {role for phase in stage.recipe.phases for role in phase.roles}
    for role, module in built.modules.items():
        moved = any(not torch.equal(tensor, before[role][key]) for key, tensor in module.state_dict().items())
        assert moved == (role in updated), role


def test_a_long_rollout_goes_through_wans_vae(wan_home, monkeypatch):
    """The picture that a judged window begins with stands for four frames before it, of which the VAE makes one."""
    codec = "models.codec={codec: {use: wan_vae, with: {path: wan_models/Wan2.1-T2V-1.3B, device: cpu}}}"
    graphs = {"generator": ("dmd_generator_long", ", grad_frames: 3"), "critic": ("score_critic_long", "")}
    given = [f"phases.{phase}.graph=specs/{graph}.yaml" for phase, (graph, _) in graphs.items()]
    given += [f"phases.{phase}.with={WINDOW}{own}}}" for phase, (_, own) in graphs.items()]
    (stage,) = load_recipe("mine.yaml", [*FEW, "latents.frames=12", codec, *given])
    built = build_stage(stage, CPU, {})
    made = []
    for name in ("decode", "encode"):
        code = getattr(built.ports["codec"], name)
        monkeypatch.setattr(built.ports["codec"], name, lambda given, code=code: made.append(code(given)) or made[-1])
    step = TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe, stage.path)))
    before = {role: everything(module) for role, module in built.modules.items()}
    for index in range(2):
        assert all(value.isfinite() for value in step(index).values())
    moved = {r for r, module in built.modules.items() if any((t != before[r][n]).any() for n, t in module.state_dict().items())}
    assert moved == {"generator", "fake_score"}
    assert {tuple(out.shape[-3:]) for out in made} == {(3, 32, 32), (16, 4, 4)}


def nested(graph: Graph) -> set[str]:
    """Names of the graphs and transforms in a graph."""
    found = set()
    for node in graph.nodes:
        found.add(node.op.name)
        if isinstance(node.op, Graph):
            found |= nested(node.op)
    return found


def test_methods_share_their_rollout_noising_and_scores():
    graphs = {name: nested(Graph.from_spec(f"specs/{name}.yaml")) for name in (
        "dmd_generator", "sid_generator", "dmd2_generator", "gan_generator", "score_critic", "dmd2_critic", "gan_discriminator",
    )}  # fmt: skip
    assert all({"rollout", "noised"} <= names for names in graphs.values())
    assert all("scores" in graphs[name] for name in ("dmd_generator", "sid_generator", "dmd2_generator"))
    assert {"dmd", "adversarial"} <= graphs["dmd2_generator"]
    assert {"critic", "discriminator"} <= graphs["dmd2_critic"]


def test_sid_leaves_scores_without_gradient_but_uses_theirs(tmp_path):
    """The generator's gradient through the scores is not that of scores held fixed."""
    (stage,) = load_recipe("recipes/digits/sid.yaml", FEW)
    built = build_stage(stage, CPU, {})
    graph, losses = stage.graphs["generator"], {}
    values = next(iter(make_loader(stage.recipe, stage.path)))
    from sftk.functional import Key

    key = Key(seed=0, samples=(0, 1))
    values = {name: values[name] for name in ("prompt_embeds", "negative_embeds")}
    values |= {"key": key, "noise": key.normal("noise", (21, 4, 8, 8))}
    for fixed in (False, True):
        for role in ("real_score", "fake_score"):
            built.modules[role].requires_grad_(False)
        nodes = [node if not (fixed and node.op.name == "sid") else cut(node) for node in graph.nodes]
        out = graph.with_nodes(nodes).run(values, {role: built.ports[role] for role in graph.ports})
        weight = built.modules["generator"].patch_embedding.weight
        (losses[fixed],) = torch.autograd.grad(out["loss"] / out["loss_weight"], weight)
        assert all(p.grad is None for role in ("real_score", "fake_score") for p in built.modules[role].parameters())
    assert (losses[True] - losses[False]).norm() > 0.05 * losses[False].norm()


def cut(node):
    """The node of `specs/sid.yaml` with its scores evaluated without gradient."""
    import attrs

    inner = [attrs.evolve(n, grad=False) if n.op.name == "scores" else n for n in node.op.nodes]
    return attrs.evolve(node, op=node.op.with_nodes(inner))


def test_samples_of_an_earlier_phase_are_used_without_unrolling_again(tmp_path):
    text = Path(find_file("recipes/digits/sid.yaml")).read_text()
    head, phases = text.split("phases:\n")
    first, second = phases.split("  - name: critic\n")
    given = first.replace("graph: specs/sid_generator.yaml", "in: {samples: critic.x0}\n    graph: specs/sid_given.yaml")
    given = given.replace("last_step_only: true, ", "")
    critic, rest = second.split("train:")
    path = tmp_path / "given.yaml"
    path.write_text(head + "phases:\n  - name: critic\n" + critic + given + "train:" + rest)
    (stage,) = load_recipe(path, FEW)
    assert "rollout" not in nested(stage.graphs["generator"])
    built = build_stage(stage, CPU, {})
    before = everything(built.modules["generator"])
    metrics = TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe, stage.path)))(0)
    assert metrics["generator/loss"].isfinite()
    assert any(not torch.equal(t, before[name]) for name, t in built.modules["generator"].state_dict().items())


def test_a_batch_that_is_masked_out_whole_changes_nothing(tmp_path):
    overrides = [text.format(folder=tmp_path) for text in MORE["ode"]]
    (stage,) = load_recipe(
        "recipes/digits/ode.yaml", [*FEW, "phases.ode.with.steps=[0]", "optimizers.generator.warmup=0", *overrides]
    )
    prepare_data(stage, TrainingProgress(enabled=False))
    built = build_stage(stage, CPU, {})
    before = everything(built.modules["generator"])
    metrics = TrainingStep(stage.recipe, built, iter(make_loader(stage.recipe, stage.path)))(0)
    assert metrics["ode/loss"] == 0
    assert metrics["ode/grad_norm"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.modules["generator"].state_dict().items())


def test_a_branch_is_in_the_checkpoint_and_resumed(tmp_path):
    (stage,) = load_recipe("recipes/digits/gan.yaml", [*FEW, "train.steps=2", "ema.generator.start=0"])
    first = StageRun(stage, tmp_path, {})
    step = TrainingStep(stage.recipe, first.built, iter(first.loader))
    step(0)
    first.step = 1
    saved = first.save()
    assert {path.name for path in saved.glob("*.safetensors")} == {
        "generator.safetensors", "generator.ema.safetensors", "fake_score.safetensors", "discriminator.safetensors",
        "generator.optimizer.safetensors", "fake_score.optimizer.safetensors", "discriminator.optimizer.safetensors",
    }  # fmt: skip
    second = StageRun(stage, tmp_path, {})
    assert second.resume() == 1
    for role in ("fake_score", "discriminator"):
        mine, theirs = everything(first.built.modules[role]), everything(second.built.modules[role])
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    resumed = TrainingStep(stage.recipe, second.built, iter(second.loader))(1)
    assert all(torch.equal(resumed[name], value) for name, value in step(1).items())
