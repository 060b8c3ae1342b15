"""Puts the size that a model's weights have in the place of `size: auto`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from sftk.errors import CheckpointError, Problem, SpecError
from sftk.models.config import WanConfig
from sftk.models.weights import read_config
from sftk.spec.document import Document
from sftk.spec.fetch import download_of, how_to_get
from sftk.spec.files import find_file
from sftk.spec.schema import AUTO, Recipe

if TYPE_CHECKING:
    from sftk.spec.recipe import Stage


def fill_sizes(
    recipe: Recipe, document: Document, path: Path, earlier: Mapping[str, Stage | None]
) -> tuple[Recipe, list[Problem]]:
    """A recipe whose models have sizes, and what is wrong with weights that tell none.

    Weights that are not there stay `auto`; the checks report them.

    Args:
        recipe, document, path: of the stage.
        earlier: what runs before it, whose models' sizes are known without their weights.
    """
    models, problems = dict(recipe.models), []
    for role, section in recipe.models.items():
        if section.size != AUTO or section.weights is None:
            continue
        stage, slash, source = section.weights.partition("/")
        if slash and stage in earlier:
            before = earlier[stage]
            found = before.recipe.models.get(source) if before is not None else None
            size = found.size if found is not None else None
        else:
            try:
                size = read_config(find_file(section.weights, path))
            except SpecError:
                folder = download_of(section.weights, recipe.fetch)
                if folder is not None:
                    message = f"the size is read from {section.weights!r}, which is not here yet"
                    hint = f"name a size, or {how_to_get(folder, recipe.fetch)}"
                    problems.append(document.problem(("models", role, "size"), message, hint))
                continue
            except CheckpointError as error:
                problems.append(document.problem(("models", role, "weights"), str(error), None))
                continue
        if size is not None and size != AUTO:
            models[role] = attrs.evolve(section, size=size)
    return attrs.evolve(recipe, models=models), problems


def written_size(config: WanConfig | str | None) -> dict[str, Any] | str | None:
    """A size as a recipe writes it: its name, or what differs from the defaults.

    Example:
        >>> written_size(WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1))
        {'dim': 16, 'ffn_dim': 32, 'num_heads': 2, 'num_layers': 1}
    """
    if not isinstance(config, WanConfig):
        return config
    found = attrs.asdict(config)
    return {field.name: found[field.name] for field in attrs.fields(WanConfig) if found[field.name] != field.default}
