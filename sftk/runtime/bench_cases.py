"""The pieces of work that a benchmark times: a stage's phases at each exit step, a rollout, passes of the student."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from sftk.core.graph import Graph
from sftk.errors import SpecError, did_you_mean
from sftk.functional.exit_key import ExitKey
from sftk.functional.keys import Key
from sftk.runtime.build import Built
from sftk.runtime.loader import make_loader
from sftk.runtime.sample_options import role_sampling, sampled_role
from sftk.runtime.step import TrainingStep
from sftk.spec.recipe import Stage
from sftk.spec.sampling import sampler_graph
from sftk.spec.turns import Turn

ROLLOUT, FORWARD, BACKWARD, STEPS = "rollout", "forward", "forward_backward", "steps"
OWN = (ROLLOUT, FORWARD, BACKWARD, STEPS)
"""Cases besides a recipe's phases."""
MIDDLE = 500.0
"""Timestep of the single passes: any one costs the same."""


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """A piece of work.

    Args:
        name: of the phase, or one of `OWN`.
        exit_step: place in the step list at which blocks leave; None where there is no such choice.
        run: does it once.
    """

    name: str
    exit_step: int | None
    run: Callable[[], Any]


def case_names(stage: Stage, only: Sequence[str] = ()) -> tuple[str, ...]:
    """The cases that are asked for, in that order; by default all but `steps`.

    Raises:
        SpecError: there is none of that name.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/dmd.yaml")
        >>> case_names(stage), case_names(stage, ["steps", "critic"])
        (('generator', 'critic', 'rollout', 'forward', 'forward_backward'), ('steps', 'critic'))
    """
    known = [*(turn.name for turn in stage.turns), *OWN]
    for name in only:
        if name not in known:
            raise SpecError(f"there is no case {name!r} to measure, only {', '.join(known)}; {did_you_mean(name, known) or ''}")
    return tuple(dict.fromkeys(only)) or tuple(name for name in known if name != STEPS)


def producers(turns: Sequence[Turn], turn: Turn) -> tuple[Turn, ...]:
    """The turns whose outputs a turn reads, and those that these read, first things first."""
    names = {source.partition(".")[0] for source in turn.phase.in_.values() if "." in source}
    read = {earlier.phase.name: earlier for earlier in turns if earlier.phase.name in names}.values()
    return tuple(found for earlier in read for found in (*producers(turns, earlier), earlier))


def rollout_graph(stage: Stage) -> tuple[Graph, str]:
    """The rollout with which the recipe's student samples, and the student's role."""
    role = sampled_role(stage.document, stage.recipe)
    return sampler_graph(role_sampling(stage.document, stage.recipe, role)), role


def rollout_values(graph: Graph, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the rollout's graph takes of a batch with noise and key."""
    return {name: values[name] for name in (*graph.inputs, *graph.optional) if name in values}


def pass_inputs(values: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and text of a single pass, from a batch with noise."""
    noise = values["noise"]
    return noise, torch.full(noise.shape[:2], MIDDLE, device=noise.device), values["prompt_embeds"]


def randomise_zeros(module: nn.Module) -> None:
    """Gives weight matrices that start at zero small random values, in place: products of zeros run faster than others.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> randomise_zeros(layer)
        >>> bool(layer.weight.any())
        True
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)


class Cases:
    """Makes the cases of a built stage; all of them share one batch.

    Args:
        stage, built: what is measured; its weights change as phases update them.
        graph: of the rollout, from `rollout_graph`, compiled where the stage is.
    """

    def __init__(self, stage: Stage, built: Built, graph: Graph, student: str):
        self.stage, self.built, self.graph, self.student = stage, built, graph, student
        recipe, device = stage.recipe, built.device
        for role, module in built.modules.items():
            if recipe.models[role].weights is None:
                randomise_zeros(module)
        batch = next(iter(make_loader(recipe, stage.path)))
        self.batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def make(self, name: str, exits: Sequence[int | None]) -> Iterator[Case]:
        """The cases of a name, one for each exit step."""
        if name in OWN:
            run = {ROLLOUT: self._rollout, FORWARD: self._forward, BACKWARD: self._backward, STEPS: self._steps}[name]()
            yield Case(name=name, exit_step=None, run=run)
            return
        turn = next(turn for turn in self.built.turns if turn.name == name)
        for exit_step in exits:
            yield Case(name=name, exit_step=exit_step, run=self._turn(turn, exit_step))

    def clear(self) -> None:
        """Drops gradients that an interrupted case left."""
        for module in self.built.modules.values():
            module.zero_grad(set_to_none=True)

    def _training(self, make_key: Callable[..., Key]) -> TrainingStep:
        return TrainingStep(self.stage.recipe, self.built, itertools.repeat(self.batch), make_key)

    def _turn(self, turn: Turn, exit_step: int | None) -> Callable[[], Any]:
        step = self._training(functools.partial(ExitKey, exit_index=exit_step or 0))
        outputs: dict[str, Any] = {}
        inputs: dict[str, Any] = {}

        def run() -> None:
            for producer in producers(self.built.turns, turn):  # only the first time: they are no part of this turn
                if producer.phase.name not in outputs:
                    step.run_turn(producer, 0, outputs, inputs)
            step.run_turn(turn, 0, outputs, inputs)
            step.recent.clear()

        return run

    def _steps(self) -> Callable[[], Any]:
        step, steps = self._training(Key), math.lcm(*(turn.every for turn in self.built.turns))
        return lambda: [step(number) for number in range(steps)]

    def _values(self) -> dict[str, Any]:
        latents, size = self.stage.recipe.latents, len(next(v for v in self.batch.values() if isinstance(v, Tensor)))
        key = Key(seed=self.stage.recipe.seed, phase=ROLLOUT, samples=tuple(range(size)))
        shape = (latents.frames, latents.channels, latents.height, latents.width)
        return {**self.batch, "key": key, "noise": key.normal("noise", shape, device=self.built.device)}

    def _rollout(self) -> Callable[[], Any]:
        values, ports = rollout_values(self.graph, self._values()), {"denoiser": self.built.ports[self.student]}

        @torch.no_grad()
        def run() -> Any:
            return self.graph.run(values, ports)["x0"]

        return run

    def _forward(self) -> Callable[[], Any]:
        inputs, port = pass_inputs(self._values()), self.built.ports[self.student]

        @torch.no_grad()
        def run() -> Any:
            return port(*inputs)[0]

        return run

    def _backward(self) -> Callable[[], Any]:
        inputs, port, module = pass_inputs(self._values()), self.built.ports[self.student], self.built.modules[self.student]
        cotangent = torch.randn_like(inputs[0])

        def run() -> None:
            module.requires_grad_(True)
            port(*inputs)[0].backward(cotangent)
            module.zero_grad(set_to_none=True)

        return run
