"""Runs a whole training step on meta tensors: shapes and keys are checked, no weight is loaded and nothing is computed."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from sftk.core.geometry import LatentShape
from sftk.core.state import detached
from sftk.data.latent_sizes import check_batch
from sftk.data.sources import source
from sftk.errors import DataError, Problem, SpecError
from sftk.functional.keys import Key
from sftk.runtime.build import meta_module, training_graph
from sftk.runtime.port import make_port
from sftk.spec.recipe import Stage


@attrs.frozen(kw_only=True)
class PhaseShapes:
    """What a phase's graph returns: key to shape and dtype in words; `parameters` of each updated role."""

    phase: str
    outputs: dict[str, str]
    parameters: dict[str, int]


def check_shapes(stage: Stage) -> list[PhaseShapes]:
    """Runs every phase of a stage forward and backward on meta tensors.

    Args:
        stage: from `load_recipe`.

    Raises:
        SpecError: a phase fails; the problem names it and what it ran into.
    """
    recipe = stage.recipe
    models: dict[str, nn.Module] = {}
    sizes: dict[str, int] = {}
    for role, section in recipe.models.items():
        models[role] = meta_module(recipe, role)
        if section.ready_made:
            continue
        sizes[role] = sum(p.numel() for p in models[role].parameters())
        repeat_first_block(models[role])
    dtype = torch.bfloat16 if recipe.precision == "bf16" else None
    batch = meta_batch(stage)
    outputs: dict[str, dict[str, Any]] = {}
    found = []
    places = {phase.name: place for place, phase in enumerate(recipe.phases)}
    for turn in stage.turns:
        phase, (graph, tape) = turn.phase, training_graph(turn)
        for role, module in models.items():
            module.requires_grad_(role in phase.roles)
        roles = {port: phase.models.get(port, port) for port in graph.ports}
        ports = {
            port: models[role] if recipe.models[role].ready_made else make_port(models[role], dtype)
            for port, role in roles.items()
        }
        values = {name: batch[name] for name in (*graph.inputs, *graph.optional) if name in batch}
        for name, origin in phase.in_.items():
            producer, dot, output = origin.partition(".")
            values[name] = outputs[producer][output] if dot else batch[origin]
        try:
            out = graph.run(values, ports)
            out[phase.loss].backward()
            tape.pull_back()
        except Exception as error:
            problem = Problem(
                path=("phases", places[phase.name]), message=f"the phase {turn.name!r} fails on meta tensors: {error}"
            )
            raise SpecError([stage.document.locate(problem)]) from error
        outputs[phase.name] = detached(out)
        shown = {
            key: f"{str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for key, v in out.items() if isinstance(v, Tensor)
        }
        found.append(PhaseShapes(phase=turn.name, outputs=shown, parameters={role: sizes[role] for role in phase.roles}))
    return found


class RepeatedBlock(nn.Module):
    """Stands for a block of the same size as the first: gives tensors of the shapes that the first gave in this pass.

    Args:
        first: kept out of the module's own parameters.
    """

    def __init__(self, first: nn.Module):
        super().__init__()
        self.last: list[Any] = []
        first.register_forward_hook(lambda module, args, out: self.last.__setitem__(slice(None), [out[1]]))

    def forward(self, x: Tensor, *args: Any) -> tuple[Tensor, Any]:
        (kv,) = self.last
        return x.clone(), None if kv is None else tuple(torch.empty_like(tensor) for tensor in kv)


def repeat_first_block(model: nn.Module) -> None:
    """Replaces all blocks of a backbone on meta tensors but the first: they would compute the same shapes, one by one.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> with torch.device("meta"):
        ...     model = WanModel(preset("digits"))
        >>> repeat_first_block(model)
        >>> model(*(torch.empty(s, device="meta") for s in ((1, 3, 4, 8, 8), (1, 3), (1, 4, 32))))[0].shape
        torch.Size([1, 3, 4, 8, 8])
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and len(blocks) > 1:
        repeated = RepeatedBlock(blocks[0])
        for index in range(1, len(blocks)):
            blocks[index] = repeated


def meta_batch(stage: Stage) -> dict[str, Any]:
    """A micro-batch of a stage on meta tensors, with the runner's noise and key.

    Raises:
        SpecError: its latents have another size than the recipe's.
    """
    recipe = stage.recipe
    size, _ = recipe.batch.split()
    data = source(recipe.data.use)
    options = recipe.data.with_
    shapes = data.sample_shapes(**attrs.asdict(recipe.latents), options=options)
    if shapes is not None:
        values: dict[str, Any] = {key: torch.empty(size, *shape, device="meta") for key, shape in shapes.items()}
    else:
        samples = data.build(**attrs.asdict(recipe.latents), seed=recipe.seed, options=options)
        batch = data.collate([samples[i % len(samples)] for i in range(size)])
        values = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        check_batch(recipe.data.use, values, attrs.astuple(recipe.latents))
    except DataError as error:
        raise SpecError([stage.document.locate(Problem(path=("data",), message=str(error)))]) from error
    shape = LatentShape(
        frames=recipe.latents.frames,
        channels=recipe.latents.channels,
        height=recipe.latents.height,
        width=recipe.latents.width,
    )
    values["noise"] = torch.empty(shape.tensor_shape(size), device="meta")
    values["key"] = Key(seed=recipe.seed, samples=tuple(range(size)))
    return values
