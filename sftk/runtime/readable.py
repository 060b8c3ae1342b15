"""Whether what reads files finds there what it needs: by names and shapes, before a value is read."""

from __future__ import annotations

import math
from pathlib import Path

from sftk.data.codecs import make_codec
from sftk.data.embedders import make_embedder
from sftk.data.held import HoldsWeights
from sftk.errors import SpecError
from sftk.models.formats import open_weights
from sftk.models.weights import check_weights
from sftk.runtime.build import meta_module
from sftk.spec.data_files import found_choice
from sftk.spec.files import find_file
from sftk.spec.readers import Reader
from sftk.spec.recipe import Stage


def inspect_reader(reader: Reader, stage: Stage) -> int | None:
    """How many weights something in a recipe will load, after a look at its files.

    Args:
        reader: of `recipe_readers`.
        stage: from `load_recipe`.

    Returns:
        None where it loads none, or where a file is not here.

    Raises:
        CheckpointError: files are broken, lack something or are of another model.
        DataError: they are of other sizes than the options say.
        SftkError: the library that reads them is not installed.

    Example:
        >>> from sftk.spec.readers import recipe_readers
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/digits/df.yaml")
        >>> [inspect_reader(reader, stage) for reader in recipe_readers(stage.recipe)]
        [689776]
    """
    if reader.kind == "weights":
        return _weights(reader, stage)
    if reader.kind == "data" or reader.choice is None or any(_found(name, stage) is None for name in reader.names.values()):
        return None
    choice = found_choice(reader.kind, reader.choice, stage.path)
    made = make_codec(choice) if reader.kind == "codec" else make_embedder(choice)
    return made.inspect() if isinstance(made, HoldsWeights) else None


def _weights(reader: Reader, stage: Stage) -> int | None:
    ((place, name),) = reader.names.items()
    path = _found(name, stage)
    if path is None:
        return None
    if place[0] == "models":
        source, _ = check_weights(meta_module(stage.recipe, str(place[1])), path)
    else:
        source = open_weights(path)
        source.check_backbone()
    return sum(math.prod(shape) for shape in source.shapes.values())


def _found(name: str, stage: Stage) -> Path | None:
    """Where a file is; None where it is not here, as weights of an earlier stage are not."""
    try:
        return find_file(name, stage.path)
    except SpecError:
        return None
