"""Builds what a stage needs: models behind ports, averages, optimisers, compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from sftk.core.graph import Graph
from sftk.core.replay import Tape, replayed
from sftk.data.builtins import ready_made
from sftk.errors import CheckpointError
from sftk.functional.flash import has_flash_4
from sftk.models.branch import ClassifierBranch
from sftk.models.held_linear import HalfLinear, hold_linears
from sftk.models.wan import WanModel
from sftk.models.weights import DTYPES, build_module
from sftk.runtime.acceleration import backbones, compiles, fuses, replays_passes
from sftk.runtime.attention_auto import settle_attention
from sftk.runtime.cuda_graphs import replay_passes
from sftk.runtime.device import set_precision
from sftk.runtime.ema import Ema
from sftk.runtime.gradients import GradientSync
from sftk.runtime.lowp import check_fp8, release_weights, use_fp8
from sftk.runtime.mesh import Mesh
from sftk.runtime.optim import make_optimizer
from sftk.runtime.parallelize import Sharding, limit_recompiles, parallelize
from sftk.runtime.port import make_port
from sftk.runtime.segments import compile_segments
from sftk.runtime.sequence import SequenceGroup, share_sequence
from sftk.runtime.shards import local, rows
from sftk.spec.arrangement import policies
from sftk.spec.data_files import found_choice
from sftk.spec.fetch import how_to_get, missing_files
from sftk.spec.files import find_file
from sftk.spec.lowp import gradient_roles, holds_half
from sftk.spec.recipe import Stage
from sftk.spec.schema import ModelSection, Recipe
from sftk.spec.turns import Turn

WeightFinder = Mapping[str, Path]
"""`<stage>/<role>` to the weight file that the stage left."""


@attrs.frozen(kw_only=True, eq=False)
class Built:
    """A stage's moving parts.

    Args:
        modules: role to module, for roles that are neither averages nor built in.
        emas: role to average.
        ports: role to what graphs call, averages and built-in modules among them.
        optimizers: role to optimiser.
        syncs: role to what sums its gradients over the ranks, for roles in `modules`.
        turns: the phases as they run.
        graphs: turn to graph, compiled where the recipe says so.
        tapes: turn to what its graph leaves for after the loss's backward pass.
        device: where they live.
        mesh: the ranks.
    """

    modules: dict[str, nn.Module]
    emas: dict[str, Ema]
    ports: dict[str, Any]
    optimizers: dict[str, torch.optim.Optimizer]
    syncs: dict[str, GradientSync]
    turns: tuple[Turn, ...]
    graphs: dict[str, Graph]
    tapes: dict[str, Tape]
    device: torch.device
    mesh: Mesh

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Roles of which an average is kept compute with it inside: for evaluation."""
        self.rest()
        with ExitStack() as stack:
            for ema in self.emas.values():
                stack.enter_context(ema.swapped())
            stack.callback(self.rest)
            yield

    def rest(self) -> None:
        """Frees gathered weights of all roles."""
        for sync in self.syncs.values():
            sync.rest()


def build_stage(
    stage: Stage,
    device: torch.device,
    earlier: WeightFinder,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Built:
    """Builds a stage on a device.

    Args:
        earlier: weights of the stages before it.
        mesh: the ranks; None is a single process.
        say: told what takes a while.

    Raises:
        CheckpointError: weights do not fit.
        SpecError: the device does not do what `lowp` asks for.
    """
    recipe, mesh = stage.recipe, mesh or Mesh.single(device)
    check_fp8(recipe, device)
    compiled = compiles(recipe, device)
    settle_attention(backbones(recipe), recipe.latents, recipe.precision, device, mesh, say)
    updated = {role for phase in recipe.phases for role in phase.roles}
    bound = [(phase, gradient_roles(stage.graphs[phase.name])) for phase in recipe.phases]
    graded = {phase.models.get(role, role) for phase, roles in bound for role in roles}
    modules: dict[str, nn.Module] = {}
    for role, section in recipe.models.items():
        if section.ema_of is None and not section.ready_made:
            model = _build(stage, role, weights_file(section, stage, earlier), mesh, device, compiled)
            modules[role] = model.requires_grad_(role in updated)
            if role not in updated and role not in graded and role not in recipe.ema and _sharding(recipe, role, mesh) is None:
                release_weights(model)
    called = {section.ema_of for section in recipe.models.values()}
    emas = {
        role: Ema(modules[role], ema.decay, ema.start, _copy(stage, role, modules[role], mesh) if role in called else None)
        for role, ema in recipe.ema.items()
    }
    dtype = set_precision(recipe.precision)
    ports: dict[str, Any] = {role: make_port(module, dtype) for role, module in modules.items()}
    for role, section in recipe.models.items():
        if section.ema_of is not None:
            average = emas[section.ema_of].module
            assert average is not None
            ports[role] = make_port(average, dtype)
        elif section.ready_made:
            ports[role] = ready_made(section.builtin, found_choice("codec", section.codec, stage.path), device)
    optimizers: dict[str, torch.optim.Optimizer] = {
        role: make_optimizer(dict(modules[role].state_dict(keep_vars=True)), section)
        for role, section in recipe.optimizers.items()
    }
    whole = recipe.parallel.accumulate == "whole"
    syncs = {role: GradientSync(module, mesh, whole=whole) for role, module in modules.items()}
    if compiled:
        limit_recompiles()
    graphs: dict[str, Graph] = {}
    tapes: dict[str, Tape] = {}
    for turn in stage.turns:
        graph, tapes[turn.name] = training_graph(turn)
        graphs[turn.name] = compile_segments(graph) if compiled else graph
    return Built(
        modules=modules,
        emas=emas,
        ports=ports,
        optimizers=optimizers,
        syncs=syncs,
        turns=stage.turns,
        graphs=graphs,
        tapes=tapes,
        device=device,
        mesh=mesh,
    )


def training_graph(turn: Turn) -> tuple[Graph, Tape]:
    """A turn's graph as it is trained, and the tape to pull back after the loss's backward pass (empty without replay)."""
    return replayed(turn.graph) if turn.phase.backward == "replay" else (turn.graph, Tape())


def _build(stage: Stage, role: str, weights: Path | None, mesh: Mesh, device: torch.device, compiled: bool) -> nn.Module:
    """A role's module with its weights; of a sharded one each rank reads and holds its rows."""
    recipe = stage.recipe
    sharding = _sharding(recipe, role, mesh)
    offload = sharding is not None and sharding.offload

    def wrap(module: nn.Module) -> nn.Module:
        module = _share(module.to("cpu") if offload and not _on_meta(module) else module, mesh)
        module = _linears(recipe, role, module, sharded=sharding is not None)
        checkpoint = recipe.models[role].checkpoint
        return parallelize(module, checkpoint=checkpoint, compile_blocks=compiled, sharding=sharding)

    module = build_module(
        functools.partial(construct, recipe, role),
        weights=weights,
        seed=recipe.seed * 1000 + list(recipe.models).index(role),
        dtype="fp64" if recipe.precision == "fp64" else recipe.models[role].dtype,
        device=torch.device("cpu") if offload and weights is not None else device,
        wrap=wrap,
        here=lambda tensor: (local(tensor), rows(tensor)),
    )
    _equip(module, recipe, role, device)
    replayed = isinstance(module, WanModel) and sharding is None and mesh.sequence_group is None
    return replay_passes(module) if replayed and replays_passes(recipe, device) else module


def _copy(stage: Stage, role: str, source: nn.Module, mesh: Mesh) -> nn.Module:
    """A frozen module with the same weights, sharded alike: FSDP2 modules cannot be copied."""
    recipe, sharding = stage.recipe, _sharding(stage.recipe, role, mesh)
    parameter = next(source.parameters())
    with torch.device("meta"):
        module = _share(construct(recipe, role).to(parameter.dtype), mesh)
    module = _linears(recipe, role, module, sharded=sharding is not None)
    if sharding is not None:  # it changes after every step, and what stayed gathered would not
        sharding = attrs.evolve(sharding, reshard=True)
    module = parallelize(module, sharding=sharding).to_empty(device=parameter.device)
    given = source.state_dict()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            local(tensor).copy_(local(given[name]))
    _equip(module, recipe, role, parameter.device)
    return module.requires_grad_(False).eval()


def _sharding(recipe: Recipe, role: str, mesh: Mesh) -> Sharding | None:
    """How a role is sharded, or None when each rank holds all of it on its device."""
    policy = policies(recipe)[role]
    offload = bool(policy.offload)
    if mesh.shards(role) == 1 and not offload:
        return None
    half = recipe.precision == "bf16" and recipe.models[role].dtype == "fp32"
    gather = torch.bfloat16 if half else None
    narrow = DTYPES[recipe.models[role].dtype].itemsize < 4 and recipe.precision != "fp64"
    sums = narrow and recipe.parallel.accumulate == "sharded" and role in recipe.optimizers
    return Sharding(
        mesh=mesh.weights(role, partial_sums=sums), reshard=policy.reshard is not False, offload=offload, gather=gather
    )


def _share(module: nn.Module, mesh: Mesh) -> nn.Module:
    """The module, which computes its part of each sample where several ranks share one."""
    group = mesh.sequence_group
    return module if group is None else share_sequence(module, SequenceGroup.of(group))


def _linears(recipe: Recipe, role: str, module: nn.Module, *, sharded: bool) -> nn.Module:
    """The module, whose layers compute in fp8, or without gradient with weights held in bfloat16, where they are to."""
    section = recipe.models[role]
    half, lowp = holds_half(recipe, role), section.lowp.over(recipe.lowp)
    if section.size is not None and lowp.fp8_layers:
        return use_fp8(module, hold=not sharded and (half or lowp.linears == "fp8"), lowp=lowp)
    return hold_linears(module, HalfLinear) if half and not sharded else module


def _equip(module: nn.Module, recipe: Recipe, role: str, device: torch.device) -> None:
    """Gives a backbone the Triton kernels, and attention in fp8, where they are to be used."""
    if not isinstance(module, WanModel):
        return
    lowp = recipe.models[role].lowp.over(recipe.lowp)
    module.fp8_attention = lowp.attention == "fp8"
    module.fp8_attention_trains = lowp.training == "fp8" and (device.type != "cuda" or has_flash_4())
    if fuses(recipe, device):
        from sftk.models.kernels.block_ops import TritonOps

        module.ops = TritonOps()


def _on_meta(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


def construct(recipe: Recipe, role: str) -> nn.Module:
    """A role's module with weights of no meaning: a backbone, or a branch on another role's."""
    section = recipe.models[role]
    if section.branch is not None and section.branch_of is not None:
        return ClassifierBranch(recipe.models[section.branch_of].config, section.branch, section.backend)
    return WanModel(section.config, section.backend)


def meta_module(recipe: Recipe, role: str) -> Any:
    """What a role's port calls, on meta tensors: shapes alone. An average is a module of the role that it follows."""
    section, device = recipe.models[role], torch.device("meta")
    if section.ready_made:
        return ready_made(section.builtin, section.codec, device)
    with device:
        return construct(recipe, section.ema_of or role).to(DTYPES[section.dtype])


def weights_file(section: ModelSection, stage: Stage, earlier: WeightFinder) -> Path | None:
    """The file that a model's `weights` names, or None for random weights.

    Raises:
        CheckpointError: it must be downloaded first.
    """
    if section.weights is None:
        return None
    if section.weights in earlier:
        return earlier[section.weights]
    for file in missing_files(stage):
        if file.name == section.weights:
            how = how_to_get(file.folder or file.name, stage.recipe.fetch)
            raise CheckpointError(f"the weights {file.name!r} of {', '.join(file.used_by)} are not here yet; {how}")
    return find_file(section.weights, stage.path)
