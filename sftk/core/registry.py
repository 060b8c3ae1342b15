"""Names of transforms, as specs use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sftk.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from sftk.core.transform import Transform

_transforms: dict[str, Transform] = {}
_graph_reader: list[Callable[..., Any]] = []

BUILTIN = ("sftk.functional", "sftk.objectives", "sftk.spec")
"""What registers the package's own transforms and its reader of specs; by name, as core imports nothing above it."""


def register(name: str, made: Transform) -> None:
    """Adds a transform under a name that no other has.

    Raises:
        SpecError: the name is taken by another function. The same one, of a module imported again or of a script that is a
            plugin, too, replaces its old self.
    """
    old = _transforms.get(name)
    if old is not None and old.__module__ != made.__module__ and _file(old) != _file(made):
        raise SpecError(
            f"the transform name {name!r} is taken by {old.__module__}; give the one in {made.__module__} another name"
        )
    _transforms[name] = made


def _file(made: Transform) -> Any:
    """The source file of a function behind a transform; something of its own where there is none."""
    code = getattr(getattr(made, "fn", None), "__code__", None)
    return made if code is None else code.co_filename


def unregister(name: str) -> None:
    """Removes a name again (tests and notebooks)."""
    _transforms.pop(name, None)


def restore(before: Mapping[str, Transform]) -> None:
    """Goes back to what `transforms` gave before, copied."""
    _transforms.clear()
    _transforms.update(before)


def lookup(name: str) -> Transform:
    """The transform of that name.

    Raises:
        SpecError: no such name; the message suggests the nearest.

    Example:
        >>> lookup("add_noise")
        <transform add_noise(x0, noise, timestep) -> noisy>
    """
    if name not in _transforms:
        _load_builtin()
    if name not in _transforms:
        hint = did_you_mean(name, _transforms)
        raise SpecError(f"unknown transform {name!r}" + (f"; {hint}" if hint else "") + " (is its module in `plugins:`?)")
    return _transforms[name]


def transforms() -> Mapping[str, Transform]:
    """Every registered transform by name (read-only)."""
    _load_builtin()
    return MappingProxyType(_transforms)


def _load_builtin() -> None:
    for name in BUILTIN:
        import_module(name)


def set_graph_reader(reader: Callable[..., Any]) -> None:
    """Tells `Graph.from_spec` how to read a file; called once by `sftk.spec`."""
    _graph_reader[:] = [reader]


def read_graph(path: Any, params: Mapping[str, Any]) -> Any:
    """A graph from a spec file, through the reader that `sftk.spec` installed."""
    if not _graph_reader:
        _load_builtin()
    return _graph_reader[0](path, params)
