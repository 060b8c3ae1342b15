"""Files that a recipe names: which they are, which are here, and how the others are downloaded or made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from sftk.errors import DataError, SpecError
from sftk.models.tensor_files import split_entry
from sftk.spec.files import find_file
from sftk.spec.readers import recipe_readers
from sftk.spec.schema import FetchSection

if TYPE_CHECKING:
    from sftk.spec.recipe import Stage


@attrs.frozen(kw_only=True)
class NamedFile:
    """A file or folder that a recipe names.

    Args:
        name: as the recipe says it.
        used_by: the places in the recipe, such as `models.generator`.
        path: where it is, or None.
        folder: of the recipe's `fetch` that brings it, or None.
        sampling: only `sftk sample` reads it, and no training.
    """

    name: str
    used_by: tuple[str, ...]
    path: Path | None
    folder: str | None
    sampling: bool = False


def fetchable(fetch: Mapping[str, FetchSection]) -> dict[str, str]:
    """Names that a recipe may use before the files are there, and the key of `fetch` that brings each.

    Example:
        >>> section = FetchSection(repo="someone/weights", files=("a/init.pt",))
        >>> fetchable({"models/init": section})
        {'models/init/a/init.pt': 'models/init'}
        >>> fetchable({"models/whole": FetchSection(repo="someone/weights")})
        {'models/whole': 'models/whole'}
    """
    names = {}
    for folder, section in fetch.items():
        names |= {f"{folder}/{name}": folder for name in section.files} if section.files else {folder: folder}
    return names


def download_of(name: str, fetch: Mapping[str, FetchSection]) -> str | None:
    """The key of `fetch` that brings a file; of `file.pt:<entry>`, the file.

    Example:
        >>> download_of("models/init.pt:generator", {"models": FetchSection(repo="someone/weights", files=("init.pt",))})
        'models'
    """
    return fetchable(fetch).get(str(split_entry(name)[0]))


def recipe_files(stage: Stage) -> tuple[NamedFile, ...]:
    """Every file that a stage names, found or not; weights of earlier stages are left out.

    Args:
        stage: from `load_recipe`.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> [file.name for file in recipe_files(load_recipe("recipes/dmd.yaml")[0])]
        ['assets/digits/init.safetensors', 'assets/digits/teacher.safetensors']
    """
    recipe = stage.recipe
    used: dict[str, list[str]] = {}
    training: set[str] = set()
    for reader in recipe_readers(recipe):
        for place, name in reader.names.items():
            used.setdefault(name, []).append(".".join(map(str, place)))
            training |= set() if reader.sampling else {name}
    found = []
    for name, places in used.items():
        folder = download_of(name, recipe.fetch)
        try:
            path, _ = split_entry(find_file(name, stage.path))
        except SpecError:
            if folder is None:
                continue
            path = None
        found.append(NamedFile(name=name, used_by=tuple(places), path=path, folder=folder, sampling=name not in training))
    return tuple(found)


def missing_files(stage: Stage, *, sampling: bool = False) -> tuple[NamedFile, ...]:
    """Files of a stage that must be downloaded or made before it trains.

    Args:
        sampling: also those that only `sftk sample` reads.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> missing_files(load_recipe("recipes/dmd.yaml")[0])
        ()
    """
    return tuple(file for file in recipe_files(stage) if file.path is None and (sampling or not file.sampling))


def require_files(stage: Stage) -> None:
    """Checks that everything is there that a stage reads, before it starts.

    Raises:
        DataError: files are missing; each is named with its users and the way to get it.
    """
    lines = [
        f"{file.name} ({', '.join(file.used_by)}) is not here; {how_to_get(file.folder or file.name, stage.recipe.fetch)}"
        for file in missing_files(stage)
    ]
    if lines:
        raise DataError("\n".join(lines))


def how_to_get(folder: str, fetch: Mapping[str, FetchSection]) -> str:
    """How an entry of `fetch` comes to be, for a message.

    Example:
        >>> how_to_get("data/clips", {"data/clips": FetchSection(own="clips of your own")})
        'put it there: clips of your own'
        >>> how_to_get("models", {"models": FetchSection(repo="someone/weights")})
        'download it: hf download someone/weights --local-dir models'
    """
    section = fetch[folder]
    if section.own is not None:
        return f"put it there: {section.own}"
    return f"{'make' if section.repo is None else 'download'} it: {fetch_command(folder, section)}"


def fetch_command(folder: str, section: FetchSection) -> str:
    """The shell command that makes an entry of `fetch`; a comment for what only the user has.

    Source: huggingface_hub, `hf download`.

    Example:
        >>> fetch_command("wan_models/Wan2.1-T2V-1.3B", FetchSection(repo="Wan-AI/Wan2.1-T2V-1.3B"))
        'hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B'
        >>> fetch_command("data/clips", FetchSection(own="clips of your own"))
        '# data/clips: clips of your own'
    """
    if section.command is not None:
        return section.command
    if section.repo is None:
        return f"# {folder}: {section.own}"
    return shlex.join(["hf", "download", section.repo, *section.files, "--local-dir", folder])
