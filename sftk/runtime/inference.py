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
from sftk.models.config import WanConfig
from sftk.models.formats import open_weights
from sftk.models.tensor_files import split_entry
from sftk.models.weight_folders import STEM
from sftk.models.weights import build_model
from sftk.runtime.checkpoint import AVERAGE, OPTIMIZER, checkpoint_files, last_checkpoint
from sftk.runtime.evaluators import evaluation_options
from sftk.runtime.port import Port
from sftk.runtime.sampling import AnyStudentSampling, StudentSampling, sample_latents, student_graph
from sftk.spec.convert import structure
from sftk.spec.document import Document
from sftk.spec.files import find_file
from sftk.spec.params import spec_params
from sftk.spec.plugins import load_plugins
from sftk.spec.recipe import load_recipe
from sftk.spec.schema import AUTO, Recipe
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


def load_student(
    path: Path, *, role: str | None = None, device: torch.device | None = None, weights: Path | None = None
) -> Student:
    """A student from a run's folder, one of its checkpoints, or a weight file in one; or from a recipe and weights.

    Args:
        path: the folder or file.
        role: which model; by default the evaluated student, or the only updated one. Its average is taken where one is kept.
        device: where to put it.
        weights: what `open_weights` reads, instead of the run's own; `path` may then be a recipe, whose student they are.

    Raises:
        CheckpointError: there is no such checkpoint or role; the message lists what is there.
    """
    path, device = Path(path), device or torch.device("cpu")
    if weights is not None and path.suffix in (".yaml", ".yml"):
        last = load_recipe(path)[-1]
        document, recipe = last.document, last.recipe
        sampling, evaluated = recipe_sampling(document, recipe)
    else:
        recipe_file = _recipe_above(path)
        if recipe_file is None:
            raise CheckpointError(f"{path} does not lie in a run's folder (no recipe.yaml above it)")
        stage, document, recipe = _last_stage(recipe_file)
        load_plugins(recipe, document, recipe_file)
        sampling, evaluated = recipe_sampling(document, recipe)
        if weights is None:
            weights = path if path.is_file() else _weights(path, recipe_file.parent, stage, role or evaluated, recipe)
    config = _config_of(weights, recipe, role or evaluated or student_role(recipe))
    model = build_model(config, weights=weights, seed=0, dtype="fp32", backend="auto", device=device).requires_grad_(False)
    latents = recipe.latents
    return Student(
        port=Port(model, None),
        sampling=sampling,
        data=source(recipe.data.use).for_options(recipe.data.with_),
        shape=(latents.frames, latents.channels, latents.height, latents.width),
        weights=weights,
        device=device,
    )


def find_weights(path: Path, *, role: str | None = None, average: bool = True) -> Path:
    """The weights that a path means: those of a run's student, or what lies there when it is in no run.

    Args:
        path: a run's folder, one of its checkpoints, or what `open_weights` reads.
        role: which model of the run, see `load_student`.
        average: take the average where one is kept.

    Raises:
        CheckpointError: there is no such checkpoint or role; the message lists what is there.
    """
    file, _ = split_entry(path)
    recipe_file = _recipe_above(file)
    if file.is_file() or recipe_file is None or any(file.glob(f"{STEM}*")):
        if role is not None:
            raise CheckpointError(f"{path} is no run or checkpoint, so it has no role {role!r}; leave out --role")
        return path
    stage, document, recipe = _last_stage(recipe_file)
    load_plugins(recipe, document, recipe_file)
    _, evaluated = recipe_sampling(document, recipe)
    return _weights(path, recipe_file.parent, stage, role or evaluated, recipe, average)


def student_role(recipe: Recipe) -> str:
    updated = [role for phase in recipe.phases for role in phase.roles]
    return "generator" if "generator" in updated else updated[0]


def _config_of(weights: Path, recipe: Recipe, role: str) -> WanConfig:
    """The size in our own files, or the one that the recipe gives its student, whose weights they are."""
    source = open_weights(weights)
    section = recipe.models.get(role)
    if source.own_config is not None or section is None or section.size in (None, AUTO):
        return source.config()
    return section.config


def _recipe_above(path: Path) -> Path | None:
    if not path.exists():
        raise CheckpointError(f"no such checkpoint {path}; expected a run's folder, a folder in its checkpoints/, or weights")
    return next((p / "recipe.yaml" for p in (path, *path.parents) if (p / "recipe.yaml").is_file()), None)


def _last_stage(file: Path) -> tuple[str, Document, Recipe]:
    document = read_yaml(file)
    if "stages" in document.value:
        name = list(document.value["stages"])[-1]
        document = document.at(("stages", name))
    else:
        folders = sorted(p.name for p in (file.parent / "checkpoints").glob("*") if p.is_dir())
        name = folders[-1] if folders else ""
    return name, document, structure(document, Recipe)


def recipe_sampling(document: Document, recipe: Recipe) -> tuple[AnyStudentSampling, str | None]:
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


def _weights(path: Path, run: Path, stage: str, role: str | None, recipe: Recipe, average: bool = True) -> Path:
    folder = (
        path
        if path.name.startswith("step_")
        else last_checkpoint(path if path.parent.name == "checkpoints" else run / "checkpoints" / stage)
    )
    if folder is None:
        raise CheckpointError(f"{path} holds no complete checkpoint yet")
    files = {name: file for name, file in checkpoint_files(folder).items() if not name.endswith(OPTIMIZER)}
    role = role or student_role(recipe)
    for name in (f"{role}{AVERAGE}", role) if average else (role,):
        if name in files:
            return files[name]
    raise CheckpointError(f"{folder} has no weights of {role!r}, only {sorted(files)}; {did_you_mean(role, files) or ''}")
