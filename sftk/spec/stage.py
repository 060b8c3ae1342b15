"""One stage of a recipe, ready to build."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import attrs

from sftk.core.graph import Graph
from sftk.core.plugins import Registered
from sftk.errors import SpecError
from sftk.spec.data_files import change_files, choice_files, named_files
from sftk.spec.document import Document
from sftk.spec.dump import dump_yaml
from sftk.spec.files import find_file, search_roots
from sftk.spec.schema import AUTO, Recipe
from sftk.spec.sizes import written_size
from sftk.spec.turns import Turn, turns


@attrs.frozen(kw_only=True, eq=False)
class Stage:
    """One stage, ready to build: the recipe, its graphs and the document that it came from.

    Args:
        name: of the stage; the recipe file's stem when it is the only one.
        recipe: what it says.
        graphs: phase name to graph.
        document: as read, with overrides.
        path: the recipe file.
        plugins: what its own registered, where it is one of several stages or rows that must not see each other's.
    """

    name: str
    recipe: Recipe
    graphs: dict[str, Graph]
    document: Document
    path: Path
    plugins: Registered = attrs.field(factory=Registered)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Its phases as they run, see `sftk.spec.turns`."""
        return turns(self.recipe, self.graphs)

    @property
    def resolved(self) -> dict[str, Any]:
        """The recipe as a plain value that can be read from anywhere: files outside the package by their whole path."""
        with self.plugins.again():
            return self._resolved()

    def _resolved(self) -> dict[str, Any]:
        value = copy.deepcopy(self.document.value)
        for phase in value["phases"]:
            if phase.get("graph") is not None:
                phase["graph"] = self._whole(phase["graph"])
        for model in value["models"].values():
            if isinstance(model.get("weights"), str):
                model["weights"] = self._whole(model["weights"])
            if isinstance(model.get("codec"), dict):
                model["codec"] = change_files(model["codec"], choice_files("codec", model["codec"]), self._whole)
        for role, section in self.recipe.models.items():
            if value["models"][role].get("size") == AUTO:
                value["models"][role]["size"] = written_size(section.size)
        if value["data"].get("with"):
            options = value["data"]["with"]
            value["data"]["with"] = change_files(options, named_files(value["data"]["use"], options), self._whole)
        for option in ("text", "codec"):
            choice = (value.get("sample") or {}).get(option)
            if isinstance(choice, dict):
                value["sample"][option] = change_files(choice, choice_files(option, choice), self._whole)
        if value.get("plugins"):
            value["plugins"] = [self._whole(name) if name.endswith(".py") else name for name in value["plugins"]]
        return value

    def _whole(self, name: str) -> str:
        try:
            found = find_file(name, self.path).resolve()
        except SpecError:
            return name  # weights of an earlier stage
        inside = any(found.is_relative_to(root.resolve()) for root in search_roots()[1:])
        return name if inside else str(found)

    @property
    def text(self) -> str:
        """The resolved recipe as YAML."""
        return dump_yaml(self.resolved)
