"""One training step: a fold over phases, each a graph, a backward pass and an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from sftk.core.geometry import LatentShape
from sftk.core.graph import Graph
from sftk.core.state import detached, from_state, to_state
from sftk.functional.keys import Key
from sftk.runtime.build import Built
from sftk.runtime.optim import apply_gradients, learning_rate, set_learning_rate
from sftk.spec.schema import PhaseSection, Recipe
from sftk.spec.turns import Turn

Metrics = dict[str, Tensor]


class TrainingStep:
    """Runs the phases of a recipe, one step after the other.

    Args:
        recipe: phases, batch and learning rates.
        built: models, optimisers, averages and graphs; the step changes them.
        batches: endless micro-batches of the data.
        make_key: makes the keys of draws; a benchmark chooses exit steps with it.
    """

    def __init__(self, recipe: Recipe, built: Built, batches: Iterator[Mapping[str, Any]], make_key: Callable[..., Key] = Key):
        self.recipe, self.built, self.batches, self.make_key = recipe, built, batches, make_key
        self.shape = LatentShape(
            frames=recipe.latents.frames,
            channels=recipe.latents.channels,
            height=recipe.latents.height,
            width=recipe.latents.width,
        )
        self.recent: dict[tuple[int, str], tuple[Turn, list[dict[str, Any]]]] = {}
        """(step, phase) to its turn and its micro-batches, of this step and the one before, whose metrics are read late."""

        self.mesh = built.mesh
        self.per_rank, self.accumulation = recipe.batch.split(self.mesh.data_world)
        self.dtype = torch.float64 if recipe.precision == "fp64" else None

    def __call__(self, step: int) -> Metrics:
        """Runs step number `step`, counted from 0, and returns its metrics as tensors that nothing waited for.

        With several ranks, each runs its share of the samples; metrics are those of the whole batch, on every rank.
        """
        metrics: Metrics = {}
        self.recent = {place: found for place, found in self.recent.items() if place[0] == step - 1}
        outputs: dict[str, list[dict[str, Any]]] = {}
        inputs: dict[str, list[dict[str, Any]]] = {}
        for turn in self.built.turns:
            if turn.due(step):
                metrics |= self.run_turn(turn, step, outputs, inputs)
        for ema in self.built.emas.values():
            ema.update(step)
        return metrics

    def run_turn(
        self, turn: Turn, step: int, outputs: dict[str, list[dict[str, Any]]], inputs: dict[str, list[dict[str, Any]]]
    ) -> Metrics:
        """One phase of a step, up to its update.

        Args:
            outputs, inputs: those of the phases so far, by name, for each micro-batch; this phase adds its own.
        """
        phase, graph, recipe, built = turn.phase, self.built.graphs[turn.name], self.recipe, self.built
        self.mesh.world_.watch.at(f"step {step + 1}, phase {phase.name!r}")
        for role, module in built.modules.items():
            module.requires_grad_(role in phase.roles)
        models = {port: built.ports[phase.models.get(port, port)] for port in graph.ports}
        total, weights = None, None
        logged: dict[str, list[Tensor]] = {key: [] for key in phase.log}
        outputs[phase.name], inputs[phase.name] = [], []
        self.recent[step, phase.name] = turn, []
        for micro in range(self.accumulation):
            values = self._inputs(phase, graph, step, micro, outputs, inputs)
            self.recent[step, phase.name][1].append(values)
            out = from_state(graph(to_state(values, like=TensorDict()), models))
            loss, weight = out[phase.loss], out[f"{phase.loss}_weight"]
            self._backward(turn, loss, last=micro + 1 == self.accumulation)
            total = loss.detach() if total is None else total + loss.detach()
            weights = weight if weights is None else weights + weight
            for key, found in logged.items():
                value = out[key].detach()
                found.append(value.to(torch.promote_types(value.dtype, torch.float32)).mean())
            outputs[phase.name].append(detached({key: value for key, value in out.items() if key in graph.outputs}))
        for role in phase.roles:
            built.syncs[role].finish()
        assert total is not None and weights is not None
        means = {key: torch.stack(found).mean() for key, found in logged.items()}
        total, weights, means = self._over_ranks(total, weights, means)
        weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)  # a batch that is masked out whole changes nothing
        metrics = {f"{phase.name}/loss": total / weights}
        for role in phase.roles:
            optimizer = built.optimizers[role]
            set_learning_rate(optimizer, learning_rate(recipe.optimizers[role], step, recipe.train.steps))
            name = "grad_norm" if len(phase.roles) == 1 else f"grad_norm_{role}"
            metrics[f"{phase.name}/{name}"] = apply_gradients(optimizer, weights, phase.clip)
        for role in recipe.optimizers:  # what is never trained may stay gathered
            built.syncs[role].rest()
        return metrics | {f"{phase.name}/{key}": value for key, value in means.items()}

    def _backward(self, turn: Turn, loss: Tensor, *, last: bool) -> None:
        """The loss's backward pass, then those of replayed steps; ranks share gradients in the last of each."""
        syncs = [self.built.syncs[role] for role in turn.phase.roles]

        def share(now: bool) -> None:
            for sync in syncs:
                sync.before_backward(last=now)

        share(last)
        loss.backward()
        share(False)
        self.built.tapes[turn.name].pull_back(lambda: share(last))

    def _over_ranks(self, total: Tensor, weights: Tensor, means: Metrics) -> tuple[Tensor, Tensor, Metrics]:
        """Loss and weight summed over all samples, metrics averaged, in one collective."""
        mesh = self.mesh
        if mesh.world == 1:
            return total, weights, means
        local = torch.stack([value.detach().double().reshape(()) for value in (total, weights, *means.values())])
        found = mesh.sum(local) / mesh.sequence
        return found[0], found[1], {key: found[2 + i] / mesh.data_world for i, key in enumerate(means)}

    def _inputs(
        self,
        phase: PhaseSection,
        graph: Graph,
        step: int,
        micro: int,
        outputs: dict[str, list[dict[str, Any]]],
        inputs: dict[str, list[dict[str, Any]]],
    ) -> dict[str, Any]:
        """The graph's inputs for one micro-batch; a phase that reads another's outputs sees the same samples."""
        producers = [source.partition(".")[0] for source in phase.in_.values() if "." in source]
        if producers:
            values = dict(inputs[producers[0]][micro])
        else:
            values = {key: self._moved(value) for key, value in next(self.batches).items()}
        first = (micro * self.mesh.data_world + self.mesh.data_rank) * self.per_rank
        samples = tuple(range(first, first + self.per_rank))
        key = self.make_key(seed=self.recipe.seed, phase=phase.name, update=step, samples=samples)
        wanted = (*graph.inputs, *graph.optional)
        if "noise" not in values and "noise" in [phase.in_.get(name, name) for name in wanted]:
            shape, dtype = self.shape.tensor_shape(1)[1:], self.dtype or torch.float32
            values["noise"] = key.normal("noise", shape, device=self.built.device, dtype=dtype)
        values["key"] = key
        inputs[phase.name].append(values)
        found = {name: values[name] for name in wanted if name in values}
        for name, source in phase.in_.items():
            producer, dot, output = source.partition(".")
            found[name] = outputs[producer][micro][output] if dot else values[source]
        return found | {"key": key}

    def _moved(self, value: Any) -> Any:
        """A value of the data on the device; in float64 where everything is."""
        if not isinstance(value, Tensor):
            return value
        dtype = self.dtype if value.is_floating_point() else None
        return value.to(self.built.device, dtype=dtype, non_blocking=True)
