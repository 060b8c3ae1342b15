"""What a recipe's `fetch` brings; downloads go through huggingface_hub when it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from sftk.errors import DataError
from sftk.spec.fetch import fetch_command, missing_files
from sftk.spec.recipe import Stage
from sftk.spec.schema import FetchSection


@attrs.frozen(kw_only=True)
class Download:
    """One entry of a recipe's `fetch` that is not here, or not whole.

    Args:
        folder: where it goes, below the working directory.
        section: what it is.
    """

    folder: str
    section: FetchSection

    @property
    def command(self) -> str:
        """The shell command that makes it, or a comment."""
        return fetch_command(self.folder, self.section)

    @property
    def downloads(self) -> bool:
        """Whether huggingface_hub brings it; else its user makes it."""
        return self.section.repo is not None


def downloads(stages: Sequence[Stage], *, everything: bool = False) -> tuple[Download, ...]:
    """What the stages of a recipe need and lack, each folder once.

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
        wanted = {file.folder for file in missing_files(stage)}
        for folder, section in stage.recipe.fetch.items():
            if everything or folder in wanted:
                found.setdefault(folder, Download(folder=folder, section=section))
    return tuple(found.values())


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
