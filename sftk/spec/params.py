"""A spec's parameters: declared, taken over from other specs, bound by a caller, and looked up as `$name`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from sftk.errors import Problem, SpecError, did_you_mean
from sftk.spec.document import Document, KeyPath
from sftk.spec.files import find_file, show_path
from sftk.spec.source import read_yaml

ALL = "$params"
"""In the place of a nested spec's `with`: every parameter that the used spec has, too, under the same name."""


@attrs.frozen(kw_only=True)
class Origin:
    """A parameter's value and the place that a mistake in it is blamed on."""

    value: Any
    document: Document
    path: KeyPath
    prefix: KeyPath = ()

    def blame(self, message: str, hint: str | None = None) -> Problem:
        """A problem at the place where the value was written."""
        return self.document.problem(self.path, message, hint).under(*self.prefix)


def declared_params(path: Path) -> tuple[dict[str, Origin], list[Problem]]:
    """The parameters of a spec with their defaults as written: those of the specs in `params_of`, then its own.

    An own default takes the place of an inherited one. Two inherited defaults that differ are a problem, unless the spec has
    its own.
    """
    return _declared(path.resolve(), ())


def spec_params(path: Path) -> dict[str, Any]:
    """The parameters that a spec has, with their defaults.

    Example:
        >>> spec_params(find_file("specs/sample_ode.yaml"))["steps"]
        50
    """
    return {name: origin.value for name, origin in declared_params(path)[0].items()}


def _declared(path: Path, stack: tuple[Path, ...]) -> tuple[dict[str, Origin], list[Problem]]:
    document = read_yaml(path, show_path(path))
    found: dict[str, Origin] = {}
    problems: list[Problem] = []
    own = document.get(("params",), {})
    own = own if isinstance(own, dict) else {}
    others = document.get(("params_of",), [])
    for index, name in enumerate(others if isinstance(others, list) else []):
        place = ("params_of", index)
        try:
            other = find_file(str(name), path).resolve()
            if other == path or other in stack:
                names = " -> ".join(show_path(p) for p in (*stack, path, other))
                problems.append(document.problem(place, f"specs take parameters from each other in a circle: {names}"))
                continue
            inherited, wrong = _declared(other, (*stack, path))
        except SpecError as error:
            problems += [p if p.file else document.problem(place, p.message, p.hint) for p in error.problems]
            continue
        problems += wrong
        for key, origin in inherited.items():
            if key in found and key not in own and found[key].value != origin.value:
                first, second = found[key], origin
                message = f"{key!r} is {first.value!r} in {first.document.file} and {second.value!r} in {second.document.file}"
                problems.append(document.problem(place, message, f"give {key!r} a default under `params`"))
            found.setdefault(key, origin)
    for name, default in own.items():
        found[name] = Origin(value=default, document=document, path=("params", name))
    return found, problems


class Parameters:
    """What `$name` stands for in one spec.

    Args:
        path: the spec.
        document: its text, for places.
    """

    def __init__(self, path: Path, document: Document):
        self.path, self.document = path, document
        self.declared, self.problems = declared_params(path)
        self.env: dict[str, Origin] = {}
        self.used: set[str] = set()

    def bind(self, bound: Mapping[str, Origin], defaults: Mapping[str, Any]) -> None:
        """Gives every parameter its value: the caller's, else that of `defaults`, else the spec's own."""
        for name, origin in bound.items():
            if name not in self.declared:
                hint = did_you_mean(name, self.declared) or ("it has none" if not self.declared else None)
                self.problems.append(origin.blame(f"{show_path(self.path)} has no parameter {name!r}", hint))
        for name, here in self.declared.items():
            default = here.value
            if isinstance(default, str) and default.startswith("$"):
                self.used.add(default[1:])
            if name in bound:
                self.env[name] = bound[name]
            elif name in defaults:
                self.env[name] = attrs.evolve(here, value=defaults[name])
            else:
                self.env[name] = self.resolve(here)

    def resolve(self, here: Origin) -> Origin:
        """A written value, or what the parameter stands for when it is `$name`."""
        raw = here.value
        if not (isinstance(raw, str) and raw.startswith("$")):
            return here
        name = raw[1:]
        if name not in self.env:
            later = name in self.declared
            message = f"{raw} stands for a parameter that " + (
                "is declared further down" if later else "this spec does not declare"
            )
            self.problems.append(here.blame(message, did_you_mean(name, self.declared)))
            return attrs.evolve(here, value=None)
        self.used.add(name)
        return self.env[name]

    def shared_with(self, other: Path) -> dict[str, Origin]:
        """The parameters that another spec has, too."""
        names = [name for name in declared_params(other)[0] if name in self.env]
        self.used |= set(names)
        return {name: self.env[name] for name in names}

    def unused(self) -> list[Problem]:
        """A problem for each own parameter that nothing stands for."""
        found = []
        for name, origin in sorted(self.declared.items()):
            message = f"the parameter {name!r} is never used"
            if name in self.used:
                continue
            if origin.document.file == self.document.file:
                found.append(origin.blame(message, f"use ${name} in a node's `with`, or remove it"))
            else:
                found.append(self.document.problem(("params_of",), message, f"hand it on with `with: {ALL}`"))
        return found
