"""Videos from models: a student's cached rollout in few or in many steps, the teacher's many-step ODE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor

from sftk.core.graph import Graph
from sftk.data.sources import DataSource
from sftk.errors import Problem, SpecError
from sftk.functional.keys import Key
from sftk.runtime.mesh import Mesh
from sftk.spec.graphs import load_graph


@attrs.frozen(kw_only=True)
class StudentSampling:
    """How a distilled student samples; the names are those of `specs/rollout.yaml`.

    Keys are rotated to their place in the cache (`rope: relative`), so that videos longer than the window stay in the range of
    positions that training saw.
    """

    spec: ClassVar[str] = "specs/rollout.yaml"

    method: Literal["few_step"] = "few_step"
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    frames_per_block: int = 3
    independent_first_frame: bool = False
    context_noise: float = 0.0
    window: int | None = None
    sink: int = 0
    rope: str = "relative"
    schedule: str = "continuous"


@attrs.frozen(kw_only=True)
class CausalOdeSampling:
    """How a causal student that is not distilled samples, in many guided steps; the names are those of
    `specs/sample_causal.yaml`."""

    spec: ClassVar[str] = "specs/sample_causal.yaml"

    method: Literal["causal_ode"]
    steps: int = 50
    shift: float = 5.0
    guidance: float = 4.0
    frames_per_block: int = 3
    independent_first_frame: bool = False
    context_noise: float = 0.0
    window: int | None = None
    sink: int = 0
    rope: str = "relative"


@attrs.frozen(kw_only=True)
class TeacherSampling:
    """How a teacher samples; the names are those of `specs/sample_ode.yaml`."""

    spec: ClassVar[str] = "specs/sample_ode.yaml"

    steps: int = 50
    shift: float = 5.0
    guidance: float = 4.0
    average: bool = False


AnyStudentSampling = StudentSampling | CausalOdeSampling
"""What `student_sampling` may say; its `method` tells which."""


def sampling_problems(sampling: AnyStudentSampling | TeacherSampling, frames: int) -> tuple[Problem, ...]:
    """What is wrong with sampling `frames` frames; a problem's path is the option's name.

    Example:
        >>> [p.path for p in sampling_problems(StudentSampling(steps=(250, 500)), 21)]
        [('steps',)]
    """
    try:
        load_graph(sampling.spec, _params(sampling), frames=frames)
    except SpecError as error:
        return error.problems
    return ()


def student_graph(sampling: AnyStudentSampling) -> Graph:
    """The rollout of a student as a graph: all steps, no gradient.

    Example:
        >>> student_graph(StudentSampling()).ports, student_graph(CausalOdeSampling(method="causal_ode", steps=2)).outputs
        (('denoiser',), ('x0',))
    """
    whole = {"last_step_only": True} if isinstance(sampling, StudentSampling) else {}
    return Graph.from_spec(sampling.spec, **whole, **_params(sampling)).subgraph(["x0"])


def teacher_graph(sampling: TeacherSampling) -> Graph:
    """The ODE sampler of a teacher as a graph.

    Example:
        >>> teacher_graph(TeacherSampling(steps=2)).outputs
        ('x0',)
    """
    return Graph.from_spec(sampling.spec, **_params(sampling))


def _params(sampling: AnyStudentSampling | TeacherSampling) -> dict[str, Any]:
    """The parameters of its spec."""
    return {name: value for name, value in attrs.asdict(sampling).items() if name != "method"}


@torch.no_grad()
def sample_latents(
    graph: Graph,
    denoiser: Any,
    prompts: Sequence[str],
    data: DataSource,
    shape: tuple[int, int, int, int],
    *,
    seed: int,
    device: torch.device,
    batch: int = 64,
    extra: Mapping[str, Tensor] | None = None,
    mesh: Mesh | None = None,
) -> Tensor:
    """Latents for prompts, each with noise keyed by its place in the list, so that the batch size does not matter.

    Several ranks share the prompts. Each makes the same number of passes, as sharded models need every rank in each.

    Args:
        graph: from `student_graph` or `teacher_graph`.
        denoiser: the model port.
        prompts: texts.
        data: embeds them.
        shape: frames, channels, height, width.
        seed: of the noise.
        batch: prompts in one pass.
        extra: further inputs of the graph, [N, ...] each, such as `initial_latents`.
        mesh: the ranks; None is one.

    Returns:
        [N, F, C, H, W] float32, on the CPU; the same on every rank.
    """
    assert data.embed is not None
    found = []
    mesh = mesh or Mesh.single(device)
    for places in shared_places(len(prompts), batch, mesh.data_rank, mesh.data_world):
        part = [prompts[place] for place in places]
        key = Key(seed=seed, phase="sample", samples=places)
        values: dict[str, Any] = {
            "key": key,
            "noise": key.normal("noise", shape, device=device),
            "prompt_embeds": data.embed(part).to(device),
            "negative_embeds": data.embed([""] * len(part)).to(device),
        }
        values |= {name: tensor[list(places)].to(device) for name, tensor in (extra or {}).items()}
        wanted = (*graph.inputs, *graph.optional)
        x0 = graph.run({name: value for name, value in values.items() if name in wanted}, {"denoiser": denoiser})["x0"]
        found.append(x0.float().cpu())
    return torch.cat(mesh.gather(torch.cat(found))[:: mesh.sequence])[: len(prompts)]


def shared_places(count: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[tuple[int, ...]]:
    """Which of `count` places a rank works on in each pass; where the last ranks run out, they repeat the last place.

    Example:
        >>> [list(shared_places(7, 2, rank, 3)) for rank in range(3)]
        [[(0, 1), (2,)], [(3, 4), (5,)], [(6, 6), (6,)]]
        >>> list(shared_places(5, 2))
        [(0, 1), (2, 3), (4,)]
    """
    each = -(-count // world)
    for start in range(rank * each, (rank + 1) * each, batch):
        stop = min(start + batch, (rank + 1) * each)
        yield tuple(min(place, count - 1) for place in range(start, stop))
