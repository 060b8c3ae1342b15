"""The models of a stage on meta tensors, with what counts their passes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import nn

from sftk.runtime.build import meta_module
from sftk.runtime.parallelize import parallelize
from sftk.runtime.plan_blocks import Active, measure_blocks
from sftk.runtime.plan_trace import HalfPrecision, Trace
from sftk.runtime.sequence import SequenceGroup, share_sequence
from sftk.runtime.shapes import meta_batch
from sftk.spec.recipe import Stage


@attrs.frozen
class Unit:
    """Weights that FSDP2 gathers together, by their shapes."""

    shapes: tuple[torch.Size, ...]

    def padded(self, shards: int) -> int:
        """How many there are when each is cut by rows into so many equal parts, the last ones filled up.

        Example:
            >>> Unit((torch.Size((3, 2)), torch.Size((4,)))).padded(2)
            12
        """
        return sum(math.ceil(shape[0] / shards) * shards * math.prod(shape[1:]) for shape in self.shapes)


@attrs.frozen(kw_only=True)
class RoleSize:
    """A role's weights: bytes of each, and the weights by unit: first what no block holds, then each block."""

    bytes_each: int
    units: tuple[Unit, ...]

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return self.padded(1)

    def padded(self, shards: int) -> int:
        """How many there are in as many shards, with what fills them up."""
        return sum(unit.padded(shards) for unit in self.units)

    def block(self, shards: int) -> int:
        """How many the largest block has."""
        return max((unit.padded(shards) for unit in self.units[1:]), default=0)


@attrs.frozen(kw_only=True, eq=False)
class MetaStage:
    """A stage without weights, ready to be passed through.

    Args:
        models: role to module, each with its activation checkpoints and measured blocks.
        sizes: of the roles that are no averages and not built in.
        batch: a micro-batch, with noise and key.
        active: holds the trace that counts at the moment. half: autocast for meta tensors, or None.
    """

    stage: Stage
    models: dict[str, nn.Module]
    sizes: dict[str, RoleSize]
    batch: dict[str, Any]
    active: Active
    half: HalfPrecision | None

    @contextmanager
    def traced(self) -> Iterator[Trace]:
        """A new trace, which counts what runs inside."""
        self.active.trace = trace = Trace()
        for role, section in self.stage.recipe.models.items():
            if not section.ready_made:
                trace.ignore(self.models[role])
        with trace, self.half or nullcontext():
            yield trace


def meta_stage(stage: Stage, sharded: Collection[str] = ()) -> MetaStage:
    """Builds a stage's models on meta tensors.

    Args:
        stage: from `load_recipe`.
        sharded: roles that FSDP2 shards, and so gathers in half precision under `precision: bf16`; autocast makes no copies.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/digits/df.yaml")
        >>> meta_stage(stage).sizes["denoiser"].parameters
        689776
    """
    recipe = stage.recipe
    active = Active(Trace())
    half = HalfPrecision(torch.bfloat16, lambda: active.trace) if recipe.precision == "bf16" else None
    models: dict[str, nn.Module] = {}
    sizes: dict[str, RoleSize] = {}
    for role, section in recipe.models.items():
        models[role] = model = meta_module(recipe, role)
        if section.ready_made:
            continue
        if section.ema_of is None:
            sizes[role] = _size(model)
        if half is not None and (section.ema_of or role) in sharded:
            model.to(half.dtype)
        if half is not None:
            for block in getattr(model, "blocks", ()):
                half.around(block)
        share_sequence(model, SequenceGroup(name=role, rank=0, degree=recipe.parallel.sequence))
        models[role] = parallelize(model, checkpoint=section.checkpoint)
        measure_blocks(models[role], active)
    return MetaStage(stage=stage, models=models, sizes=sizes, batch=meta_batch(stage), active=active, half=half)


def _size(model: nn.Module) -> RoleSize:
    blocks = [tuple(block.parameters()) for block in getattr(model, "blocks", ())]
    inside = {id(p) for block in blocks for p in block}
    root = tuple(p for p in model.parameters() if id(p) not in inside)
    units = tuple(Unit(tuple(p.shape for p in unit)) for unit in (root, *blocks))
    return RoleSize(bytes_each=next(model.parameters()).element_size(), units=units)
