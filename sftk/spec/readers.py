"""What of a recipe reads files that it names: which names, where they stand, and whether training needs them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, Literal

import attrs

from sftk.data.choices import Choice
from sftk.data.sources import CHOICES, SOURCES
from sftk.spec.data_files import choice_files, named_files
from sftk.spec.document import KeyPath
from sftk.spec.sample_checks import sample_choices
from sftk.spec.schema import Recipe


@attrs.frozen(kw_only=True)
class Reader:
    """Something in a recipe that reads files.

    Args:
        place: of it in the recipe, such as ("models", "generator") or ("sample", "codec").
        kind: `weights` of a backbone or a branch, a `codec`, a `text` embedder, or what else a data set reads.
        names: the files as the recipe names them, by where they stand.
        choice: of a codec or an embedder.
        sampling: only `sftk sample` reads it, and no training.
    """

    place: KeyPath
    kind: Literal["weights", "codec", "text", "data"]
    names: dict[KeyPath, str]
    choice: Choice | None = None
    sampling: bool = False


def recipe_readers(recipe: Recipe) -> Iterator[Reader]:
    """Everything in a recipe that reads files, in its order.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/wan-1.3b/tf.yaml")
        >>> [(".".join(reader.place), reader.sampling) for reader in recipe_readers(stage.recipe)]
        [('models.denoiser', False), ('data.with.path', False), ('data.with.text', False), ('data.with.codec', True),
         ('sample.text', True), ('sample.codec', True)]
    """
    for role, model in recipe.models.items():
        place = ("models", role)
        if model.weights is not None:
            yield Reader(place=place, kind="weights", names={place: model.weights})
        yield from _choice((*place, "codec"), model.codec, sampling=False)
    yield from _data(recipe)
    for option, choice in sample_choices(recipe.sample):
        yield from _choice(("sample", option), choice, sampling=True)


def _data(recipe: Recipe) -> Iterator[Reader]:
    options, seen = recipe.data.with_, set[KeyPath]()
    for path, name in named_files(recipe.data.use, options):
        place = ("data", "with", *path)
        if path[-2:-1] == ("with",) and path[-3] in CHOICES:
            if path[:-2] not in seen:
                seen.add(path[:-2])
                yield from _choice(place[:-2], _at(options, path[:-2]), sampling=not _is_used(recipe, path[:-2]))
        else:
            yield Reader(place=place, kind="weights" if path[-1] == "weights" else "data", names={place: name})


def _is_used(recipe: Recipe, path: KeyPath) -> bool:
    """Whether a data set's samples are made with a choice; a codec may be there for `sftk sample` alone."""
    owner = recipe.data.use if len(path) == 1 else _at(recipe.data.with_, path[:-2]).get("use")
    return path[-1] != "codec" or owner not in SOURCES or SOURCES[owner].encodes


def _choice(place: KeyPath, choice: Any, *, sampling: bool) -> Iterator[Reader]:
    kind: Any = place[-1]
    names = {(*place, *path): name for path, name in choice_files(kind, choice)}
    if names:
        yield Reader(place=place, kind=kind, names=names, choice=choice, sampling=sampling)


def _at(options: Any, path: KeyPath) -> Any:
    return reduce(lambda value, key: value[key], path, options)
