"""Files that the options of data sets, embedders and codecs name: found as specs and weights are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sftk.data.choices import file_options, options_of, section_class
from sftk.data.sources import CHOICES, SOURCES
from sftk.spec.document import KeyPath
from sftk.spec.files import find_file

Places = Iterator[tuple[KeyPath, str]]
"""Where a file is named, as a path into the options, and its name."""


def named_files(use: str, options: Mapping[str, Any]) -> Places:
    """Where a data set's options name a file, and which; those of its embedder, its codec and a `source` among them.

    Example:
        >>> options = {"source": {"use": "prompts", "with": {"path": "a.txt"}}, "teacher": {"weights": "b.safetensors"}}
        >>> list(named_files("ode_pairs", options))
        [(('source', 'with', 'path'), 'a.txt'), (('teacher', 'weights'), 'b.safetensors')]
    """
    if use in SOURCES:
        yield from _option_files(SOURCES[use].settings or SOURCES[use].make, options)


def choice_files(option: str, choice: Any) -> Places:
    """The same for a `text` or `codec` as a recipe writes it.

    Example:
        >>> list(choice_files("codec", {"use": "wan_vae", "with": {"path": "wan_models/Wan2.1-T2V-1.3B"}}))
        [(('with', 'path'), 'wan_models/Wan2.1-T2V-1.3B')]
    """
    _, registry = CHOICES[option]
    inner = choice.get("with") if isinstance(choice, Mapping) else None
    if isinstance(inner, Mapping) and str(choice.get("use")) in registry:
        yield from _under("with", _option_files(registry[choice["use"]], inner))


def change_files(value: Mapping[str, Any], places: Places, change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a mapping with each file's name changed.

    Args:
        value: the options, or a choice.
        places: from `named_files` or `choice_files`.

    Example:
        >>> codec = {"use": "wan_vae", "with": {"path": "vae"}}
        >>> change_files(codec, choice_files("codec", codec), str.upper)
        {'use': 'wan_vae', 'with': {'path': 'VAE'}}
    """
    changed = copy.deepcopy(dict(value))
    for path, name in places:
        place: Any = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = change(name)
    return changed


def found_files(use: str, options: Mapping[str, Any], beside: Path | None) -> dict[str, Any]:
    """A copy of a data set's options with each file's name replaced by where it was found.

    Args:
        beside: the recipe.

    Raises:
        SpecError: a file is missing.
    """
    return change_files(options, named_files(use, options), lambda name: str(find_file(name, beside)))


def found_choice(option: str, choice: Any, beside: Path | None) -> Any:
    """A `text` or `codec` (or None) with each file's name replaced by where it was found.

    Args:
        beside: the recipe.

    Raises:
        SpecError: a file is missing.
    """
    if not isinstance(choice, Mapping):
        return choice
    return change_files(choice, choice_files(option, choice), lambda name: str(find_file(name, beside)))


def _option_files(make: Callable[..., Any], options: Mapping[str, Any]) -> Places:
    files, annotations = file_options(make), options_of(make)
    for option, value in options.items():
        if option in files and isinstance(value, str):
            yield (option,), value
        elif option not in annotations or not isinstance(value, Mapping):
            continue
        elif option in CHOICES:
            yield from _under(option, choice_files(option, value))
        elif option == "source":
            inner = value.get("with")
            if isinstance(inner, Mapping):
                yield from _under(option, _under("with", named_files(str(value.get("use")), inner)))
        elif (section := section_class(annotations[option])) is not None:
            yield from _under(option, _option_files(section, value))


def _under(key: str, places: Places) -> Places:
    for path, name in places:
        yield (key, *path), name
