"""What a stage loads beside its roles' weights: codecs, text encoders and built-in modules, whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator

from sftk.data.codecs import make_codec
from sftk.data.embedders import make_embedder
from sftk.data.held import Held, held_weights
from sftk.errors import SpecError
from sftk.runtime.build import meta_module
from sftk.spec.data_files import found_choice
from sftk.spec.readers import recipe_readers
from sftk.spec.recipe import Stage


def loaded_weights(stage: Stage) -> dict[str, Held]:
    """What phases and data load, by its place in the recipe; from its files where they are here, else as published.

    Args:
        stage: from `load_recipe`.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> {name: held.bytes for name, held in loaded_weights(load_recipe("recipes/wan-1.3b/dmd_long.yaml")[0]).items()}
        {'models.codec.codec': 507570124}
    """
    return dict((*_builtins(stage), *_choices(stage)))


def _builtins(stage: Stage) -> Iterator[tuple[str, Held]]:
    for role, section in stage.recipe.models.items():
        if section.builtin is not None:
            own = list(meta_module(stage.recipe, role).parameters())
            if own:
                size = sum(weight.numel() * weight.element_size() for weight in own)
                yield f"models.{role}", Held(parameters=sum(w.numel() for w in own), bytes=size, on_device=True)


def _choices(stage: Stage) -> Iterator[tuple[str, Held]]:
    for reader in recipe_readers(stage.recipe):
        if reader.choice is None or reader.sampling:
            continue
        try:
            choice = found_choice(reader.kind, reader.choice, stage.path)
        except SpecError:  # not here yet
            choice = reader.choice
        held = held_weights(make_codec(choice) if reader.kind == "codec" else make_embedder(choice))
        if held is not None:
            yield ".".join(map(str, reader.place)), held
