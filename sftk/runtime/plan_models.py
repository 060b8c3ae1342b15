"""The models of a stage on meta tensors, with what counts their passes."""

from __future__ import annotations

from collections.abc import Iterator
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


@attrs.frozen(kw_only=True)
class RoleSize:
    """A role's weights: how many, bytes of each, bytes of its largest block (or of all, without blocks)."""

    parameters: int
    bytes_each: int
    block_bytes: int


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
        with trace, self.half or nullcontext():
            yield trace


def meta_stage(stage: Stage) -> MetaStage:
    """Builds a stage's models on meta tensors.

    Args:
        stage: from `load_recipe`.

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
        if half is not None:
            for block in getattr(model, "blocks", ()):
                half.around(block)
        share_sequence(model, SequenceGroup(name="", rank=0, degree=recipe.parallel.sequence))
        models[role] = parallelize(model, checkpoint=section.checkpoint)
        measure_blocks(models[role], active)
    return MetaStage(stage=stage, models=models, sizes=sizes, batch=meta_batch(stage), active=active, half=half)


def _size(model: nn.Module) -> RoleSize:
    parameters = list(model.parameters())
    blocks = getattr(model, "blocks", None) or [model]
    block = max(sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks)
    return RoleSize(parameters=sum(p.numel() for p in parameters), bytes_each=parameters[0].element_size(), block_bytes=block)
