"""Puts a checkpoint back into a stage, whatever number of ranks and sharding it was written with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

import sftk
from sftk.errors import CheckpointError
from sftk.models.shard_files import read_shards
from sftk.models.tensor_files import Stored
from sftk.models.weights import check_fit
from sftk.runtime.build import Built
from sftk.runtime.checkpoint import AVERAGE, OPTIMIZER, checkpoint_files, last_checkpoint, read_facts
from sftk.runtime.checkpoint_state import optimizer_state, saved_models
from sftk.runtime.checkpoint_storage import PartsReader, first_failure, quiet
from sftk.runtime.optim_8bit import quantized_states
from sftk.spec.fingerprint import fingerprint, first_difference
from sftk.spec.recipe import Stage


def restore(path: Path, built: Built, roles: Iterable[str]) -> None:
    """Loads weights, averages and optimiser states, in place, each rank the slices that it holds.

    Args:
        path: the checkpoint's folder.
        built: what it is put into.
        roles: whose weights were saved, with their averages.

    Raises:
        CheckpointError: something is missing, broken or of another model; on all ranks.
    """
    stored = built.mesh.world_.told_by_first(
        lambda: {part: read_shards(file)[0] for part, file in checkpoint_files(path).items()}
    )
    wanted: dict[str, Mapping[str, Tensor]] = {}
    for role, ema in built.emas.items():
        if f"{role}{AVERAGE}" in stored:
            ema.begin()
    for part, model in saved_models(built, roles).items():
        if part not in stored:
            raise CheckpointError(f"{path} has no weights of {part!r}, only {sorted(stored)}; is it another recipe's?")
        wanted[part] = model.state_dict()
        check_fit(wanted[part], stored[part], path / f"{part}.safetensors")
    states: dict[str, dict[Tensor, dict[str, Tensor]]] = {}
    for role, optimizer in built.optimizers.items():
        part = f"{role}{OPTIMIZER}"
        if part not in stored:
            message = f"{path} has no optimiser states of {role!r}, only {sorted(stored)}"
            raise CheckpointError(f"{message}; remove {path.name}, and the one before it is taken")
        wanted[part], states[role] = optimizer_state(optimizer, built.modules[role], stored[part])
    load_parts(stored, wanted)
    for role, found in states.items():
        built.optimizers[role].state.update(quantized_states(built.optimizers[role], found))


def load_parts(stored: Mapping[str, Mapping[str, Stored]], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Loads tensors in place, each rank the slices that it holds.

    Args:
        stored: part to name to where it lies.
        parts: part to name to tensor, which may be sharded otherwise than it was.

    Raises:
        CheckpointError: a file cannot be read; on all ranks.
    """
    wanted = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    reader = PartsReader({f"{part}/{name}": item for part, items in stored.items() for name, item in items.items()})
    quiet()
    try:
        load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:
        raise CheckpointError(first_failure(error)) from error


def check_unchanged(stage: Stage, folder: Path) -> None:
    """That a stage may go on from its last checkpoint, if it has one.

    Args:
        folder: of the stage's checkpoints.

    Raises:
        CheckpointError: the recipe changed in what decides the course of the training; the message names the first difference.
    """
    found = last_checkpoint(folder)
    if found is None:
        return
    facts = read_facts(found)
    difference = first_difference(facts["recipe"], fingerprint(stage))
    if difference is None:
        return
    other = f" (and sftk {facts['sftk']} wrote it, this is {sftk.__version__})" if facts["sftk"] != sftk.__version__ else ""
    raise CheckpointError(
        f"stage {stage.name!r} is not what {found} was trained with: {difference}{other}; "
        "change it back, start a new run, or go on all the same with --allow-changes"
    )
