"""What a stage's checkpoint holds, as named tensors: weights, averages and optimiser states, whatever their sharding."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sftk.errors import CheckpointError, did_you_mean
from sftk.models.tensor_files import TORCH_DTYPES, Stored
from sftk.models.weights import weights_metadata
from sftk.runtime.build import Built
from sftk.runtime.checkpoint import AVERAGE, OPTIMIZER
from sftk.runtime.checkpoint_storage import Share
from sftk.runtime.ema import Ema
from sftk.runtime.optim_8bit import plain_state


@attrs.frozen(kw_only=True, eq=False)
class Part:
    """One file of a checkpoint.

    Args:
        tensors: name to what the training uses.
        metadata: what the file says about itself.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def saved_models(built: Built, roles: Iterable[str]) -> dict[str, nn.Module | Ema]:
    """Part to model: the given roles, and every average that has begun."""
    built.rest()
    averages = {f"{role}{AVERAGE}": ema for role, ema in built.emas.items() if ema.begun}
    return {role: built.modules[role] for role in roles} | averages


def weight_parts(models: Mapping[str, nn.Module | Ema], step: int) -> dict[str, Part]:
    """The weights of models, under their own names."""
    return {
        name: Part(tensors=model.state_dict(), metadata=weights_metadata(model, {"role": name, "step": step}))
        for name, model in models.items()
    }


def optimizer_parts(built: Built) -> dict[str, Part]:
    """The states of optimisers that have stepped, as `<state>/<parameter>`; learning rates and the like are the recipe's."""
    parts = {}
    for role, optimizer in built.optimizers.items():
        parameters = built.modules[role].state_dict(keep_vars=True)
        states = {
            f"{key}/{name}": plain_state(value)
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        parts[f"{role}{OPTIMIZER}"] = Part(tensors=states, metadata={})
    return parts


def optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, stored: Mapping[str, Stored]
) -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Tensor]]]:
    """Empty states of the stored kinds, sharded as the parameters are: by stored name, and as the optimiser holds them.

    Args:
        stored: `<state>/<parameter>` to where it lies. A state of the parameter's shape is sharded as it is, another (a count
            of steps) lies whole where the optimiser wants it.

    Raises:
        CheckpointError: a state of a parameter that the module lacks.
    """
    parameters = module.state_dict(keep_vars=True)
    flags = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named: dict[str, Tensor] = {}
    states: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    for place, item in stored.items():
        key, _, name = place.partition("/")
        if name not in parameters:
            hint = did_you_mean(name, parameters) or "is it another model's?"
            raise CheckpointError(f"{item.file} has an optimiser state {key!r} of {name!r}, which the model lacks; {hint}")
        parameter, dtype = parameters[name], TORCH_DTYPES[item.dtype]
        if item.shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            group = flags[id(parameter)]
            beside = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
            value = torch.zeros(item.shape, dtype=dtype, device=beside)
        named[place] = states[parameter][key] = value
    return named, states


def shares(parts: Mapping[str, Part]) -> dict[str, Share]:
    """What this rank writes, as `part/name`: its shard, where it is this rank's turn among those that hold the same one.

    Every rank comes to the same turns, as they follow from shapes alone.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    written: dict[int, list[int]] = {}
    found: dict[str, Share] = {}
    for part, content in parts.items():
        for name, tensor in content.tensors.items():
            copies, own = _copies(tensor) if isinstance(tensor, DTensor) else (ranks, rank)
            loads = written.setdefault(copies, [0] * copies)
            turn = loads.index(min(loads))
            loads[turn] += tensor.numel() * tensor.element_size()
            share = _share(tensor) if own == turn else None
            if share is not None:
                found[f"{part}/{name}"] = share
    return found


def _copies(tensor: DTensor) -> tuple[int, int | None]:
    """How many ranks hold the same shard, and which of them this is; None for a rank outside the mesh."""
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    alike = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    own = None
    if place is not None:
        own = 0
        for dim in alike:
            own = own * mesh.size(dim) + place[dim]
    return math.prod(mesh.size(dim) for dim in alike), own


def _share(tensor: Tensor) -> Share | None:
    if not isinstance(tensor, DTensor):
        return Share(local=tensor, offsets=(0,) * tensor.ndim, shape=tuple(tensor.shape))
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    return Share(local=local, offsets=tuple(offsets), shape=tuple(tensor.shape)) if local.numel() else None
