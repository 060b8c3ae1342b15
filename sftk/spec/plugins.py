"""Plugins: modules that a recipe imports so that they register transforms, data sets and more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from sftk.core.plugins import import_plugin
from sftk.errors import Problem, SpecError
from sftk.spec.document import Document
from sftk.spec.files import find_file
from sftk.spec.schema import Recipe


def load_plugins(recipe: Recipe, document: Document, path: Path) -> list[Problem]:
    """Imports a recipe's plugins; returns what is wrong with them."""
    problems = []
    for index, plugin in enumerate(recipe.plugins):
        place = ("plugins", index)
        try:
            if plugin.endswith(".py"):
                import_file(find_file(plugin, path))
            else:
                import_plugin(plugin)
        except SpecError as error:
            problems += [document.problem(place, p.message, p.hint) for p in error.problems]
        except Exception as error:
            problems.append(
                document.problem(place, f"the plugin {plugin!r} cannot be imported: {type(error).__name__}: {error}")
            )
    return problems


def import_file(path: Path) -> None:
    """Imports a Python file once, under a name made from its path.

    Raises:
        Exception: whatever the file raises.
    """
    import_plugin(f"sftk_plugin_{path.resolve().stem}_{abs(hash(str(path.resolve()))):x}", lambda name: _load(name, path))


def _load(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
