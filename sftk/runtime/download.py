"""What a recipe's `fetch` brings; downloads go through huggingface_hub when it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from sftk.errors import CheckpointError, DataError, SftkError
from sftk.runtime.readable import inspect_reader
from sftk.spec.fetch import download_of, fetch_command, recipe_files
from sftk.spec.readers import recipe_readers
from sftk.spec.recipe import Stage
from sftk.spec.schema import FetchSection


@attrs.frozen(kw_only=True)
class Download:
    """One entry of a recipe's `fetch` that is not here, or not whole.

    Args:
        folder: where it goes, below the working directory.
        section: what it is.
        sampling: only `sftk sample` reads it, and no training.
        broken: what is wrong with it, where it is here, but not whole.
    """

    folder: str
    section: FetchSection
    sampling: bool = False
    broken: str | None = None

    @property
    def command(self) -> str:
        """The shell command that makes it, or a comment; behind it, what is to be said of it."""
        remarks = ("only to sample" * self.sampling, f"here, but {self.broken}" if self.broken else "")
        said = "; ".join(filter(None, remarks))
        return fetch_command(self.folder, self.section) + (f"  # {said}" if said else "")

    @property
    def downloads(self) -> bool:
        """Whether huggingface_hub brings it; else its user makes it."""
        return self.section.repo is not None


def downloads(stages: Sequence[Stage], *, everything: bool = False) -> tuple[Download, ...]:
    """What the stages of a recipe need and lack, each folder once; what only sampling needs is marked.

    Args:
        stages: from `load_recipe`.
        everything: also what is here already.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> first, *_ = downloads(load_recipe("recipes/wan-1.3b/tf.yaml"), everything=True)
        >>> first.section.repo
        'Wan-AI/Wan2.1-T2V-1.3B'
    """
    found: dict[str, Download] = {}
    for stage in stages:
        files = recipe_files(stage)
        wanted = {file.folder for file in files if file.path is None}
        training = {file.folder for file in files if not file.sampling}
        broken = {} if everything else _broken(stage)
        for folder, section in stage.recipe.fetch.items():
            if everything or folder in wanted or folder in broken:
                one = Download(folder=folder, section=section, sampling=folder not in training, broken=broken.get(folder))
                if folder not in found or found[folder].sampling:
                    found[folder] = one
    return tuple(found.values())


def _broken(stage: Stage) -> dict[str, str]:
    """Downloads of a stage that are here and not whole, and what is wrong with them, in a line."""
    found: dict[str, str] = {}
    for reader in recipe_readers(stage.recipe):
        folders = {download_of(name, stage.recipe.fetch) for name in reader.names.values()} - {None}
        repos = [folder for folder in folders if folder is not None and stage.recipe.fetch[folder].repo is not None]
        if not repos:
            continue
        try:
            inspect_reader(reader, stage)
        except CheckpointError as error:
            reason = str(error).splitlines()[0].partition("; ")[0]
            found = dict.fromkeys(repos, reason) | found
        except SftkError:  # not the files' fault
            continue
    return found


def run_download(download: Download) -> str:
    """Downloads one entry; what is there already is not fetched again.

    Args:
        download: one with a `repo`.

    Returns:
        The folder.

    Raises:
        DataError: huggingface_hub is not installed, or the download fails.
    """
    try:
        snapshot: Callable[..., Any] = importlib.import_module("huggingface_hub").snapshot_download
    except (ImportError, AttributeError) as error:
        message = "downloading needs huggingface_hub: pip install huggingface_hub, or run the printed commands yourself"
        raise DataError(message) from error
    section = download.section
    try:
        snapshot(section.repo, local_dir=download.folder, allow_patterns=list(section.files) or None)
    except Exception as error:
        raise DataError(f"cannot download {section.repo} into {download.folder}: {type(error).__name__}: {error}") from error
    return download.folder
