"""What ties the parts of a recipe together: roles, phases, keys, files, checked without loading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftk.core.graph import Graph
from sftk.core.replay import is_replayable
from sftk.data.builtins import BUILTINS
from sftk.data.choices import Choice, choice_findings
from sftk.data.codecs import CODECS, make_codec
from sftk.data.sources import SOURCES, data_keys, data_problems
from sftk.errors import DataError, Problem, SpecError, did_you_mean
from sftk.functional.fp8_attention import LEAST_DIM
from sftk.functional.fp8_linear import MULTIPLE
from sftk.models.branch import ClassifierBranch
from sftk.spec.arrangement import sequence_problems
from sftk.spec.data_files import Places, choice_files, named_files
from sftk.spec.document import Document
from sftk.spec.fetch import download_of
from sftk.spec.files import find_file
from sftk.spec.sample_checks import sample_files, sample_findings
from sftk.spec.schema import AUTO, ModelSection, PhaseSection, Recipe
from sftk.spec.turns import sharing_findings
from sftk.spec.validators import PLAIN_NAME

if TYPE_CHECKING:
    from sftk.spec.recipe import Stage

RUNNER_KEYS = ("noise", "key")
"""Graph inputs that the runner gives besides those of the data."""


class Checks:
    """What ties the parts of a recipe together."""

    def __init__(
        self, recipe: Recipe, document: Document, graphs: list[Graph | None], path: Path, earlier: Mapping[str, Stage | None]
    ):
        self.recipe, self.document, self.graphs, self.path, self.earlier = recipe, document, graphs, path, earlier
        self.problems: list[Problem] = []

    def all(self) -> list[Problem]:
        """Every problem."""
        self._models()
        self._optimizers()
        self._data()
        self._fetch()
        self._names()
        self.problems += [self.document.locate(problem) for problem in sequence_problems(self.recipe)]
        for path, message, hint in sample_findings(self.recipe):
            self._say(("sample", *path), message, hint)
        self._files(("sample",), sample_files(self.recipe.sample))
        seen: dict[str, tuple[PhaseSection, Graph | None]] = {}
        for index, phase in enumerate(self.recipe.phases):
            self._phase(phase, index, seen)
            seen[phase.name] = phase, self.graphs[index]
        known = {phase.name: graph for phase, graph in zip(self.recipe.phases, self.graphs, strict=True) if graph is not None}
        for path, message, hint in sharing_findings(self.recipe, known):
            self._say(path, message, hint)
        return self.problems

    def _say(self, path: tuple[str | int, ...], message: str, hint: str | None = None) -> None:
        self.problems.append(self.document.problem(path, message, hint))

    def _models(self) -> None:
        recipe, models = self.recipe, self.recipe.models
        for role, model in models.items():
            if not PLAIN_NAME.fullmatch(role):
                self._say(("models", role), f"a role is made of letters, digits, '-' and '_', found {role!r}")
            if model.builtin is not None:
                if model.builtin not in BUILTINS:
                    hint = did_you_mean(model.builtin, BUILTINS)
                    self._say(("models", role, "builtin"), f"unknown built-in model {model.builtin!r}", hint)
                continue
            if model.codec is not None:
                self._codec(role, model.codec)
                continue
            if model.ema_of is not None:
                if model.ema_of not in recipe.ema:
                    self._say(
                        ("models", role, "ema_of"), f"no EMA is kept of {model.ema_of!r}", f"add ema: {{{model.ema_of}: ...}}"
                    )
                if model.weights is not None:
                    self._say(
                        ("models", role, "weights"), f"{role!r} is an average and takes its weights from {model.ema_of!r}"
                    )
                continue
            if model.branch_of is not None:
                self._branch(role, model)
                continue
            if model.size == AUTO:  # its weights could not be read
                self._weights(role, model.weights)
                continue
            if model.config.in_dim != recipe.latents.channels:
                message = f"the model takes {model.config.in_dim} channels, the latents have {recipe.latents.channels}"
                fix = f"set latents.channels: {model.config.in_dim}, or name a size whose in_dim is {recipe.latents.channels}"
                self._say(("models", role, "size"), message, fix)
            _, rows, columns = model.config.patch_size
            if recipe.latents.height % rows or recipe.latents.width % columns:
                message = (
                    f"a patch of {rows}x{columns} does not divide latents of {recipe.latents.height}x{recipe.latents.width}"
                )
                fix = f"take a multiple of {rows} for latents.height and of {columns} for latents.width"
                self._say(("models", role, "size"), message, fix)
            wide = {name: size for name in ("dim", "ffn_dim") if (size := getattr(model.config, name)) % MULTIPLE}
            for key in model.lowp.over(recipe.lowp).fp8:
                place = ("models", role, "lowp") if getattr(model.lowp, key) else ("lowp", key)
                dim = model.config.head_dim
                if key == "attention" and (dim < LEAST_DIM or dim & (dim - 1)):
                    message = f"attention in fp8 takes heads of a power of two channels from {LEAST_DIM} on, {role!r} has {dim}"
                    self._say(place, message, "use attention: full")
                elif key != "attention" and wide:
                    message = f"fp8 products take widths that {MULTIPLE} divides, {role!r} has {wide}"
                    self._say(place, message, f"use {key}: full")
            self._weights(role, model.weights)
        for role in recipe.ema:
            if role not in models:
                self._say(("ema", role), f"{role!r} is not a model of this recipe", did_you_mean(role, models))
            elif models[role].ema_of is not None:
                self._say(("ema", role), f"{role!r} is an average itself", f"keep one of {models[role].ema_of!r}")
            elif models[role].ready_made:
                self._say(("ema", role), f"{role!r} is {_ready_made(models[role])} and never changes")

    def _codec(self, role: str, codec: Choice) -> None:
        """A codec's options, its files, and whether it makes the recipe's latents."""
        place, channels = ("models", role, "codec"), self.recipe.latents.channels
        findings = list(choice_findings("codec", CODECS, codec))
        for path, message, hint in findings:
            self._say((*place, *path), message, hint)
        self._files(place, choice_files("codec", codec))
        if findings:
            return
        try:
            made = make_codec(codec).channels
        except DataError as error:
            self._say(place, str(error))
            return
        if made != channels:
            message = f"the codec makes latents of {made} channels, the recipe has {channels}"
            self._say(place, message, f"set latents.channels: {made}, or name another codec")

    def _branch(self, role: str, model: ModelSection) -> None:
        """A branch reads hidden states of a backbone of this recipe."""
        assert model.branch_of is not None
        assert model.branch is not None
        models, place = self.recipe.models, ("models", role, "branch_of")
        if model.branch_of not in models:
            self._say(place, f"{model.branch_of!r} is not a model of this recipe", did_you_mean(model.branch_of, models))
        elif models[model.branch_of].size is None:
            backbones = ", ".join(name for name, other in models.items() if other.size is not None)
            self._say(place, f"{model.branch_of!r} is no backbone", f"name one of {backbones}")
        elif models[model.branch_of].size != AUTO:
            try:
                with torch.device("meta"):
                    ClassifierBranch(models[model.branch_of].config, model.branch)
            except SpecError as error:
                self._say(("models", role, "branch"), str(error))
        self._weights(role, model.weights)

    def _weights(self, role: str, weights: str | None) -> None:
        if weights is None:
            return
        stage, slash, source = weights.partition("/")
        if slash and stage in self.earlier:
            before = self.earlier[stage]
            known = set(before.recipe.models) if before is not None else {source}
            if source not in known:
                message = f"{stage!r} has no model {source!r}"
                self._say(("models", role, "weights"), message, did_you_mean(source, known))
            return
        self._files(("models", role), iter([(("weights",), weights)]))

    def _optimizers(self) -> None:
        updated = {role for phase in self.recipe.phases for role in phase.roles}
        for role in self.recipe.optimizers:
            if role not in self.recipe.models:
                self._say(
                    ("optimizers", role), f"{role!r} is not a model of this recipe", did_you_mean(role, self.recipe.models)
                )
            elif role not in updated:
                self._say(("optimizers", role), f"no phase updates {role!r}", "remove it, or name it in a phase's `update`")

    def _data(self) -> None:
        data = self.recipe.data
        shape = self.recipe.latents
        for path, message, hint in data_problems(
            data.use, data.with_, shape.frames, (shape.channels, shape.height, shape.width)
        ):
            self._say(("data", *path), message, hint)
        self._files(("data", "with"), named_files(data.use, data.with_))

    def _files(self, place: tuple[str | int, ...], files: Places) -> None:
        """Files that options name are there, or `fetch` says how to get them."""
        for path, name in files:
            if download_of(name, self.recipe.fetch) is not None:
                continue
            try:
                find_file(name, self.path)
            except SpecError as error:
                for problem in error.problems:
                    self._say((*place, *path), problem.message, problem.hint)

    def _fetch(self) -> None:
        """A download that nothing names is a misspelt name on one side or the other."""
        recipe = self.recipe
        named = [model.weights for model in recipe.models.values() if model.weights is not None]
        named += [name for model in recipe.models.values() for _, name in choice_files("codec", model.codec)]
        named += [name for _, name in named_files(recipe.data.use, recipe.data.with_)]
        named += [name for _, name in sample_files(recipe.sample)]
        for folder, section in recipe.fetch.items():
            if not any(download_of(name, {folder: section}) for name in named):
                hint = did_you_mean(folder, named) if named else None
                self._say(("fetch", folder), f"nothing in this recipe names {folder!r} or a file of it", hint)

    def _names(self) -> None:
        names = [phase.name for phase in self.recipe.phases]
        if not names:
            self._say(("phases",), "a recipe has at least one phase")
        for index, name in enumerate(names):
            if name in names[:index]:
                self._say(("phases", index, "name"), f"two phases are called {name!r}")

    def _phase(self, phase: PhaseSection, index: int, seen: Mapping[str, tuple[PhaseSection, Graph | None]]) -> None:
        place, recipe = ("phases", index), self.recipe
        for role in phase.roles:
            if role not in recipe.models:
                self._say((*place, "update"), f"{role!r} is not a model of this recipe", did_you_mean(role, recipe.models))
            elif role not in recipe.optimizers:
                self._say((*place, "update"), f"{role!r} has no optimizer", f"add optimizers: {{{role}: ...}}")
            elif recipe.models[role].ema_of is not None:
                self._say((*place, "update"), f"{role!r} is an average and cannot be updated")
            elif recipe.models[role].ready_made:
                self._say((*place, "update"), f"{role!r} is {_ready_made(recipe.models[role])} and cannot be updated")
        graph = self.graphs[index]
        if graph is None:
            return
        for port in phase.models:
            if port not in graph.ports:
                self._say((*place, "models", port), f"{phase.graph} has no role {port!r}", did_you_mean(port, graph.ports))
        for port in graph.ports:
            role = phase.models.get(port, port)
            if role not in recipe.models:
                where = (*place, "models", port) if port in phase.models else (*place, "graph")
                hint = did_you_mean(role, recipe.models) or f"bind it with models: {{{port}: ...}}"
                self._say(where, f"{phase.graph} needs the role {port!r}, but {role!r} is not a model of this recipe", hint)
        if phase.backward == "replay" and not is_replayable(graph):
            hint = "leave `backward` out; it serves graphs with a rollout"
            self._say((*place, "backward"), f"{phase.graph} has no step that could be replayed", hint)
        self._inputs(phase, graph, place, seen)
        weight = f"{phase.loss}_weight"
        wanted = [("loss", phase.loss)] if phase.loss not in graph.outputs else [("loss", weight)]
        for field, key in (*wanted, *(("log", key) for key in phase.log)):
            if key not in graph.outputs:
                self._say((*place, field), f"{phase.graph} has no output {key!r}", did_you_mean(key, graph.outputs))

    def _inputs(
        self,
        phase: PhaseSection,
        graph: Graph,
        place: tuple[str | int, ...],
        seen: Mapping[str, tuple[PhaseSection, Graph | None]],
    ) -> None:
        known = {*RUNNER_KEYS, *data_keys(self.recipe.data.use)}
        if self.recipe.data.use not in SOURCES:
            known |= {*graph.inputs, *phase.in_.values()}  # nobody knows what it would give
        for key, source in phase.in_.items():
            if key not in (*graph.inputs, *graph.optional):
                self._say(
                    (*place, "in", key),
                    f"{phase.graph} has no input {key!r}",
                    did_you_mean(key, (*graph.inputs, *graph.optional)),
                )
            producer, dot, output = source.partition(".")
            if not dot and source not in known:
                self._say((*place, "in", key), f"the data has no key {source!r}", did_you_mean(source, known))
            elif dot and producer not in seen:
                hint = did_you_mean(producer, seen) or "a phase reads outputs of phases above it only"
                self._say((*place, "in", key), f"no phase {producer!r} runs before {phase.name!r}", hint)
            elif dot:
                section, before = seen[producer]
                if before is not None and output not in before.outputs:
                    self._say(
                        (*place, "in", key),
                        f"the phase {producer!r} has no output {output!r}",
                        did_you_mean(output, before.outputs),
                    )
                if phase.every % section.every:
                    message = f"{phase.name!r} runs on steps on which {producer!r} does not, and so cannot read its outputs"
                    self._say((*place, "in", key), message, f"make `every` a multiple of {section.every}")
        for key in graph.inputs:
            if key not in phase.in_ and key not in known:
                self._say(
                    (*place, "graph"),
                    f"{phase.graph} needs the input {key!r}, which neither the data nor the runner gives",
                    did_you_mean(key, known),
                )


def _ready_made(model: ModelSection) -> str:
    return "built in" if model.codec is None else "a codec"
