"""Finds what a path means, a run, a checkpoint, weights, a recipe, and makes a sampler of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from sftk.data.choices import Choice
from sftk.data.codecs import check_codec, make_codec
from sftk.data.embedders import make_embedder
from sftk.data.sources import source
from sftk.errors import CheckpointError, DataError, SpecError, did_you_mean
from sftk.models.config import WanConfig
from sftk.models.formats import open_weights
from sftk.models.tensor_files import split_entry
from sftk.models.weight_folders import STEM
from sftk.models.weights import build_model
from sftk.runtime.attention_auto import settle_attention
from sftk.runtime.build import weights_file
from sftk.runtime.checkpoint import AVERAGE, OPTIMIZER, checkpoint_files, last_checkpoint
from sftk.runtime.device import set_precision
from sftk.runtime.port import Port
from sftk.runtime.prompt_embeds import PromptEmbeds
from sftk.runtime.sample_options import SampleOptions, sample_options, sampled_role
from sftk.runtime.sampler import Sampler
from sftk.spec.convert import structure
from sftk.spec.data_files import choice_files, found_choice
from sftk.spec.document import Document
from sftk.spec.fetch import download_of, how_to_get
from sftk.spec.files import find_file
from sftk.spec.plugins import load_plugins
from sftk.spec.recipe import Stage, find_document, load_recipe
from sftk.spec.schema import AUTO, Recipe
from sftk.spec.source import read_yaml

RECIPES = (".yaml", ".yml")


def load_sampler(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    role: str | None = None,
    device: torch.device | None = None,
    weights: Path | None = None,
) -> Sampler:
    """A sampler of a run's model, or of a recipe's. Sizes are read here, weights when the first video is asked for.

    Args:
        path: a run's folder, one of its checkpoints, a weight file in one; or a recipe.
        overrides: `sampling.window=21` and the like, see `SampleOptions`.
        role: which model; by default the first of the recipe's `sample`, the evaluated student, or the trained model. Of a run
            its average is taken where one is kept.
        device: where to put it; by default the CPU.
        weights: what `open_weights` reads, instead of the run's or recipe's own.

    Raises:
        CheckpointError: there is no such checkpoint or role; the message lists what is there.
        SpecError: the recipe or an override is wrong.

    Example:
        >>> load_sampler("recipes/dmd.yaml", ["sampling.window=9"]).options.sampling.window
        9
        >>> load_sampler("recipes/dmd.yaml", ["sampling.windw=9"])
        Traceback (most recent call last):
        sftk.errors.SpecError: unknown key 'windw' @ $.sampling (override 'sampling.windw=9'); did you mean 'window'?
    """
    path, device = Path(path), device or torch.device("cpu")
    if path.suffix in RECIPES:
        recipe_file, _ = find_document(path)
        last = load_recipe(path)[-1]
        document, recipe = last.document, last.recipe
        role = role or sampled_role(document, recipe)
        given, weights = weights is not None, weights or _recipe_weights(last, role)
    else:
        above = _recipe_above(path)
        if above is None:
            hint = f"to sample weights of another place, `sftk sample RECIPE --weights {path}`"
            raise CheckpointError(f"{path} does not lie in a run's folder (no recipe.yaml above it); {hint}")
        recipe_file = above
        stage, document, recipe = _last_stage(recipe_file)
        load_plugins(recipe, document, recipe_file)
        role = role or sampled_role(document, recipe)
        given = weights is not None
        if weights is None:
            weights = path if path.is_file() else _weights(path, recipe_file.parent, stage, role)
    options = sample_options(document, recipe, role, overrides)
    options = attrs.evolve(
        options,
        text=_found("text", options.text, recipe, recipe_file),
        codec=_found("codec", options.codec, recipe, recipe_file),
    )
    return make_sampler(options, recipe, _config_of(weights, recipe, role, given), weights, device)


def _found(option: str, choice: Choice | None, recipe: Recipe, beside: Path) -> Choice | None:
    """A choice with its files where they were found.

    Raises:
        DataError: one is not here yet; the message says how to get it.
        SpecError: there is none.
    """
    for path, name in choice_files(option, choice):
        try:
            find_file(name, beside)
        except SpecError as error:
            folder = download_of(name, recipe.fetch)
            if folder is not None:
                raise DataError(f"{name} ({option}) is not here; {how_to_get(folder, recipe.fetch)}") from None
            raise SpecError([attrs.evolve(problem, path=(option, *path)) for problem in error.problems]) from error
    return found_choice(option, choice, beside)


def make_sampler(options: SampleOptions, recipe: Recipe, config: WanConfig, weights: Path, device: torch.device) -> Sampler:
    """A sampler with the codec and the embedder that the options name, or else the recipe's data set.

    Raises:
        DataError: the codec or the embedder is unknown, or the codec makes other latents.
    """

    def load() -> Port:
        settle_attention([config], options.latents, options.precision, device)
        compute = set_precision(options.precision)
        dtype = options.precision if options.precision in ("bf16", "fp64") else "fp32"
        model = build_model(config, weights=weights, seed=0, dtype=dtype, backend=options.backend, device=device)
        return Port(model.requires_grad_(False), compute)

    data = source(recipe.data.use)
    embed: Any = data.embed if options.text is None else make_embedder(options.text)
    codec = data.codec if options.codec is None else make_codec(options.codec)
    if codec is not None:
        check_codec(codec, options.latents.channels, "codec")
    return Sampler(
        options=options,
        load=load,
        embeds=None if embed is None else PromptEmbeds(embed),
        codec=codec,
        device=device,
        weights=weights,
    )


def find_weights(path: Path, *, role: str | None = None, average: bool = True) -> Path:
    """The weights that a path means: those of a run's student, or what lies there when it is in no run.

    Args:
        path: a run's folder, one of its checkpoints, or what `open_weights` reads.
        role: which model of the run, see `load_sampler`.
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
    return _weights(path, recipe_file.parent, stage, role or sampled_role(document, recipe), average)


def _recipe_weights(stage: Stage, role: str) -> Path:
    """What a recipe says a role's weights are."""
    models = stage.recipe.models
    backbones = [name for name, model in models.items() if model.size is not None]
    if role not in backbones:
        raise CheckpointError(f"{role!r} is not a backbone of {stage.path}; {did_you_mean(role, backbones)}")
    weights = weights_file(models[role], stage, {})
    if weights is None:
        raise CheckpointError(f"{stage.path} names no weights of {role!r}; name some with --weights, or a run's folder")
    return weights


def _config_of(weights: Path, recipe: Recipe, role: str, given: bool) -> WanConfig:
    """The size in our own files, and in the config.json of given weights, else the one that the recipe gives the role."""
    source = open_weights(weights)
    section = recipe.models.get(role)
    if source.own_config is not None or section is None or section.size in (None, AUTO):
        return source.config()
    if source.settings is None or not given:
        return section.config
    own = section.config  # of which no config.json speaks
    kept = {"rope_base": own.rope_base, "rope_base_time": own.rope_base_time, "interval_embedding": own.interval_embedding}
    return attrs.evolve(source.config(), **kept)


def _recipe_above(path: Path) -> Path | None:
    if not path.exists():
        expected = "expected a run's folder, a folder in its checkpoints/, weights in one, or a recipe"
        raise CheckpointError(f"no such checkpoint {path}; {expected}")
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


def _weights(path: Path, run: Path, stage: str, role: str, average: bool = True) -> Path:
    folder = (
        path
        if path.name.startswith("step_")
        else last_checkpoint(path if path.parent.name == "checkpoints" else run / "checkpoints" / stage)
    )
    if folder is None:
        raise CheckpointError(f"{path} holds no complete checkpoint yet")
    files = {name: file for name, file in checkpoint_files(folder).items() if not name.endswith(OPTIMIZER)}
    for name in (f"{role}{AVERAGE}", role) if average else (role,):
        if name in files:
            return files[name]
    raise CheckpointError(f"{folder} has no weights of {role!r}, only {sorted(files)}; {did_you_mean(role, files) or ''}")
