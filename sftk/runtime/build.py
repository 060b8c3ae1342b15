"""Builds what a stage needs: models behind ports, averages, optimisers, compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from sftk.core.graph import Graph
from sftk.data.builtins import builtin
from sftk.errors import CheckpointError
from sftk.models.branch import ClassifierBranch
from sftk.models.wan import WanModel
from sftk.models.weights import build_module
from sftk.runtime.device import set_precision
from sftk.runtime.ema import Ema
from sftk.runtime.optim import make_optimizer
from sftk.runtime.parallelize import limit_recompiles, parallelize
from sftk.runtime.port import make_port
from sftk.runtime.segments import compile_segments
from sftk.spec.fetch import missing_files
from sftk.spec.files import find_file
from sftk.spec.recipe import Stage
from sftk.spec.schema import ModelSection, Recipe

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
        graphs: phase to graph, compiled where the recipe says so.
        device: where they live.
    """

    modules: dict[str, nn.Module]
    emas: dict[str, Ema]
    ports: dict[str, Any]
    optimizers: dict[str, torch.optim.Optimizer]
    graphs: dict[str, Graph]
    device: torch.device


def build_stage(stage: Stage, device: torch.device, earlier: WeightFinder) -> Built:
    """Builds a stage on a device.

    Args:
        earlier: weights of the stages before it.

    Raises:
        CheckpointError: weights do not fit.
    """
    recipe = stage.recipe
    compiled = device.type == "cuda" if recipe.compile == "auto" else recipe.compile
    updated = {role for phase in recipe.phases for role in phase.roles}
    modules: dict[str, nn.Module] = {}
    for index, (role, section) in enumerate(recipe.models.items()):
        if section.ema_of is None and section.builtin is None:
            model = build_module(
                functools.partial(construct, recipe, role),
                weights=weights_file(section, stage, earlier),
                seed=recipe.seed * 1000 + index,
                dtype=section.dtype,
                device=device,
            )
            modules[role] = model.requires_grad_(role in updated)
    emas = {role: Ema(modules[role], ema.decay, ema.start) for role, ema in recipe.ema.items()}
    for role, module in modules.items():
        parallelize(module, checkpoint=recipe.models[role].checkpoint, compile_blocks=compiled)
    dtype = set_precision(recipe.precision)
    ports: dict[str, Any] = {role: make_port(module, dtype) for role, module in modules.items()}
    for role, section in recipe.models.items():
        if section.ema_of is not None:
            ports[role] = make_port(emas[section.ema_of].module, dtype)
        elif section.builtin is not None:
            ports[role] = builtin(section.builtin, device)
    optimizers: dict[str, torch.optim.Optimizer] = {
        role: make_optimizer(modules[role].parameters(), section) for role, section in recipe.optimizers.items()
    }
    if compiled:
        limit_recompiles()
    graphs = {name: compile_segments(graph) if compiled else graph for name, graph in stage.graphs.items()}
    return Built(modules=modules, emas=emas, ports=ports, optimizers=optimizers, graphs=graphs, device=device)


def construct(recipe: Recipe, role: str) -> nn.Module:
    """A role's module with weights of no meaning: a backbone, or a branch on another role's."""
    section = recipe.models[role]
    if section.branch is not None and section.branch_of is not None:
        return ClassifierBranch(recipe.models[section.branch_of].config, section.branch, section.backend)
    return WanModel(section.config, section.backend)


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
            message = f"the weights {file.name!r} of {', '.join(file.used_by)} are not here yet"
            raise CheckpointError(f"{message}; download them with `sftk fetch {stage.path}`")
    return find_file(section.weights, stage.path)


def evaluation_port(built: Built, role: str, precision: str) -> Any:
    """A role as it is evaluated: its average where one is kept."""
    dtype = torch.bfloat16 if precision == "bf16" else None
    return make_port(built.emas[role].module, dtype) if role in built.emas else built.ports[role]
