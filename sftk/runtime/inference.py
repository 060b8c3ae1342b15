"""Loads a trained student from a run and samples videos from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sftk.data.sources import DataSource, source
from sftk.errors import CheckpointError, SftkError, did_you_mean
from sftk.models.wan import WanModel
from sftk.models.weights import load_weights, read_config
from sftk.runtime.checkpoint import last_checkpoint
from sftk.runtime.evaluators import evaluation_options
from sftk.runtime.port import Port
from sftk.runtime.sampling import AnyStudentSampling, StudentSampling, sample_latents, student_graph
from sftk.spec.convert import structure
from sftk.spec.document import Document
from sftk.spec.files import find_file
from sftk.spec.params import spec_params
from sftk.spec.recipe import load_plugins
from sftk.spec.schema import Recipe
from sftk.spec.source import read_yaml


@attrs.frozen(kw_only=True, eq=False)
class Student:
    """A trained student, ready to sample.

    Args:
        port: the model behind the model port.
        sampling: how it samples.
        data: embeds prompts and decodes latents.
        shape: frames, channels, height and width of its training clips.
        weights: the file that it came from.
        device: where it lives.
    """

    port: Any
    sampling: AnyStudentSampling
    data: DataSource
    shape: tuple[int, int, int, int]
    weights: Path
    device: torch.device

    def sample(self, prompts: Sequence[str], *, frames: int | None = None, seed: int = 0) -> Tensor:
        """Videos for prompts.

        Args:
            prompts: texts.
            frames: latent frames; by default as many as in training.
            seed: of the noise; the same prompt at the same place gives the same video.

        Returns:
            [N, F, H, W] (or with a colour axis) in [0, 1], on the CPU.

        Raises:
            SftkError: the run's data set has no texts or no pictures.
        """
        if self.data.embed is None or self.data.decode is None:
            raise SftkError("the data set of this run has neither texts nor pictures, so nothing can be sampled for a prompt")
        shape = (frames or self.shape[0], *self.shape[1:])
        graph = student_graph(self.sampling)
        latents = sample_latents(graph, self.port, prompts, self.data, shape, seed=seed, device=self.device)
        return self.data.decode(latents)


def load_student(path: Path, *, role: str | None = None, device: torch.device | None = None) -> Student:
    """A student from a run's folder, one of its checkpoints, or a weight file in one.

    Args:
        path: the folder or file.
        role: which model; by default the evaluated student, or the only updated one. Its average is taken where one is kept.
        device: where to put it.

    Raises:
        CheckpointError: there is no such checkpoint or role; the message lists what is there.
    """
    path, device = Path(path), device or torch.device("cpu")
    recipe_file = next((p / "recipe.yaml" for p in (path, *path.parents) if (p / "recipe.yaml").is_file()), None)
    if not path.exists():
        raise CheckpointError(
            f"no such checkpoint {path}; expected a run's folder, a folder in its checkpoints/, or a .safetensors file"
        )
    if recipe_file is None:
        raise CheckpointError(f"{path} does not lie in a run's folder (no recipe.yaml above it)")
    stage, document, recipe = _last_stage(recipe_file)
    load_plugins(recipe, document, recipe_file)
    sampling, evaluated = _sampling(document, recipe)
    weights = path if path.is_file() else _weights(path, recipe_file.parent, stage, role or evaluated, recipe)
    model = WanModel(read_config(weights)).requires_grad_(False).to(device)
    load_weights(model, weights)
    latents = recipe.latents
    return Student(
        port=Port(model, None),
        sampling=sampling,
        data=source(recipe.data.use).for_options(recipe.data.with_),
        shape=(latents.frames, latents.channels, latents.height, latents.width),
        weights=weights,
        device=device,
    )


def _last_stage(file: Path) -> tuple[str, Document, Recipe]:
    document = read_yaml(file)
    if "stages" in document.value:
        name = list(document.value["stages"])[-1]
        document = document.at(("stages", name))
    else:
        folders = sorted(p.name for p in (file.parent / "checkpoints").glob("*") if p.is_dir())
        name = folders[-1] if folders else ""
    return name, document, structure(document, Recipe)


def _sampling(document: Document, recipe: Recipe) -> tuple[AnyStudentSampling, str | None]:
    """How the run's student samples: as it was evaluated, else as the phases' rollouts are bound."""
    if recipe.eval is not None:
        options = evaluation_options(document, recipe)
        if getattr(options, "student", None) is not None:
            return options.student_sampling, options.student
    known = {field.name for field in attrs.fields(StudentSampling)}
    bound: dict[str, Any] = {}
    for phase in recipe.phases:
        declared = spec_params(find_file(phase.graph)) if phase.graph is not None else {}
        bound |= {name: phase.with_.get(name, declared[name]) for name in declared if name in known}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in bound.items() if not _is_reference(v)}
    return StudentSampling(**values), None


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$")


def _weights(path: Path, run: Path, stage: str, role: str | None, recipe: Recipe) -> Path:
    folder = (
        path
        if path.name.startswith("step_")
        else last_checkpoint(path if path.parent.name == "checkpoints" else run / "checkpoints" / stage)
    )
    if folder is None:
        raise CheckpointError(f"{path} holds no complete checkpoint yet")
    there = sorted(p.name.removesuffix(".safetensors") for p in folder.glob("*.safetensors"))
    updated = [r for phase in recipe.phases for r in phase.roles]
    role = role or ("generator" if "generator" in updated else updated[0])
    for name in (f"{role}.ema", role):
        if name in there:
            return folder / f"{name}.safetensors"
    raise CheckpointError(f"{folder} has no weights of {role!r}, only {there}; {did_you_mean(role, there) or ''}")
