"""Packages that are installed only where they are wanted."""

from __future__ import annotations

import importlib
from typing import Any

from sftk.errors import SftkError


def import_extra(module: str, purpose: str) -> Any:
    """A module of the `wan` extra.

    Raises:
        SftkError: it is not installed.

    Example:
        >>> import_extra("transformerz", "the text encoder")
        Traceback (most recent call last):
        sftk.errors.SftkError: the text encoder needs the package 'transformerz'; install it with `pip install 'sftk[wan]'`
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SftkError(f"{purpose} needs the package {package!r}; install it with `pip install 'sftk[wan]'`") from error
