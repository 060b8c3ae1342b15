"""What plugins add by name, and how it is forgotten again: each of several recipes has its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs

from sftk.core import registry

if TYPE_CHECKING:
    from sftk.core.transform import Transform

_named: list[tuple[dict[str, Any], dict[str, Any]]] = []
"""Registries of other things than transforms, and what each began with."""

_plugins: set[str] = set()
"""Names of modules that recipes asked for."""


def extensible(entries: dict[str, Any]) -> None:
    """Says of a registry by name, when it is made, that plugins may add to it.

    Example:
        >>> corners = {"square": 4}
        >>> extensible(corners)
        >>> with scope():
        ...     corners["triangle"] = 3
        >>> corners
        {'square': 4}
    """
    _named.append((entries, dict(entries)))


def import_plugin(name: str, load: Callable[[str], Any] = import_module) -> None:
    """Imports a module that is to register something, unless it is there.

    Args:
        name: of the module, in `sys.modules`.
        load: imports it.
    """
    registry.transforms()  # the package's own are there first, so that none counts as the plugin's
    _plugins.add(name)
    if name not in sys.modules:
        load(name)


@attrs.define(eq=False)
class Registered:
    """What was registered in a scope that has ended; nothing until then, and outside of scopes.

    Example:
        >>> corners = {"square": 4}
        >>> extensible(corners)
        >>> with scope() as found:
        ...     corners["triangle"] = 3
        >>> with found.again():
        ...     sorted(corners)
        ['square', 'triangle']
        >>> sorted(corners)
        ['square']
    """

    _transforms: dict[str, Transform] = attrs.field(factory=dict)
    _named: list[tuple[dict[str, Any], dict[str, Any]]] = attrs.field(factory=list)
    _modules: dict[str, ModuleType] = attrs.field(factory=dict)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, it is registered once more, and its modules are imported."""
        with scope():
            self.stay()
            yield

    def stay(self) -> None:
        """Registers it for good; of two things of one name, the one that stays last is found."""
        registry.restore({**registry.transforms(), **self._transforms})
        for entries, added in self._named:
            entries.update(added)
        sys.modules.update(self._modules)


@contextmanager
def scope() -> Iterator[Registered]:
    """At its end, what was registered within is forgotten, and so is that plugins were imported; what it gives, remembers.

    A module counts as a plugin where a recipe names it, or where it holds a transform that it registered; what else was
    imported of its package is imported anew with it. Whatever a module did besides registering, stays.

    Example:
        >>> from sftk.core import transform, transforms
        >>> with scope():
        ...     @transform(out="half", kind="per_sample")
        ...     def halve(x):
        ...         return x / 2
        >>> "halve" in transforms()
        False
    """
    before, modules = dict(registry.transforms()), set(sys.modules)
    others = {id(entries): dict(entries) for entries, _ in _named}
    found = Registered()
    try:
        yield found
    finally:
        added = {name: made for name, made in registry.transforms().items() if before.get(name) is not made}
        owners = _plugins | {made.__module__ for made in added.values() if _holds(made)}
        packages = {name.partition(".")[0] for name in owners - modules} - {__name__.partition(".")[0]}
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] in packages:
                found._modules[name] = sys.modules.pop(name)
        found._transforms.update(added)
        registry.restore(before)
        for entries, first in _named:
            was = others.get(id(entries), first)
            found._named.append((entries, {name: made for name, made in entries.items() if was.get(name) is not made}))
            entries.clear()
            entries.update(was)


def _holds(made: Transform) -> bool:
    """Whether a transform stands in the module that its function is of."""
    module = sys.modules.get(made.__module__)
    return module is not None and any(value is made for value in vars(module).values())
