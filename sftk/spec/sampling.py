"""How models sample: the options of each method, and the graph that each is."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import attrs

from sftk.core.graph import Graph
from sftk.data.choices import Choice
from sftk.errors import Problem, SpecError
from sftk.functional.multistep import SolverName
from sftk.functional.packed import Storage
from sftk.spec.graphs import load_graph
from sftk.spec.validators import above

GuidanceBatch = Literal["auto"] | bool
"""Whether both passes of guidance go in one call; `auto`: where memory allows."""


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
    kv_cache: Storage = "full"
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
    solver: SolverName = "euler"
    guidance_batch: GuidanceBatch = "auto"
    frames_per_block: int = 3
    independent_first_frame: bool = False
    context_noise: float = 0.0
    window: int | None = None
    sink: int = 0
    rope: str = "relative"
    kv_cache: Storage = "full"


@attrs.frozen(kw_only=True)
class TeacherSampling:
    """How a teacher samples, all frames together; the names are those of `specs/sample_ode.yaml`."""

    spec: ClassVar[str] = "specs/sample_ode.yaml"

    method: Literal["bidirectional_ode"] = "bidirectional_ode"
    steps: int = 50
    shift: float = 5.0
    guidance: float = 4.0
    solver: SolverName = "euler"
    guidance_batch: GuidanceBatch = "auto"
    average: bool = False


@attrs.frozen(kw_only=True)
class WholeFewStepSampling:
    """How a distilled bidirectional model samples, all frames together; the names are those of `specs/sample_few_step.yaml`."""

    spec: ClassVar[str] = "specs/sample_few_step.yaml"

    method: Literal["bidirectional_few_step"]
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    schedule: str = "continuous"


AnyStudentSampling = StudentSampling | CausalOdeSampling
"""What an evaluation's `student_sampling` may say; its `method` tells which."""
AnySampling = StudentSampling | CausalOdeSampling | TeacherSampling | WholeFewStepSampling
"""Every way of sampling; `method` tells which."""
METHODS: dict[str, type[AnySampling]] = {
    "few_step": StudentSampling,
    "causal_ode": CausalOdeSampling,
    "bidirectional_ode": TeacherSampling,
    "bidirectional_few_step": WholeFewStepSampling,
}


@attrs.frozen(kw_only=True)
class SampleSection:
    """How `sftk sample` makes videos with this recipe's models: `roles` says how each samples; the first is the default.

    `text` and `codec` embed prompts and decode latents; without them the data set does. `negative` is the unconditional prompt
    of guidance, `fps` the speed of videos.
    """

    roles: dict[str, AnySampling] = attrs.field(factory=dict)
    text: Choice | None = None
    codec: Choice | None = None
    negative: str | None = None
    fps: float | None = attrs.field(default=None, validator=above(0))


def sampling_problems(sampling: AnySampling, frames: int) -> tuple[Problem, ...]:
    """What is wrong with sampling `frames` frames; a problem's path is the option's name.

    Example:
        >>> [p.path for p in sampling_problems(StudentSampling(steps=(250, 500)), 21)]
        [('steps',)]
    """
    problems: tuple[Problem, ...] = ()
    try:
        load_graph(sampling.spec, _params(sampling, False), frames=frames)
    except SpecError as error:
        problems = error.problems
    if isinstance(sampling, StudentSampling | CausalOdeSampling) and ("window",) not in [p.path for p in problems]:
        window, block, sink = sampling.window, sampling.frames_per_block, sampling.sink
        if window is not None and window < block + sink:
            message = f"a window of {window} frames cannot hold a block of {block} and {sink} sink frames"
            problems = (*problems, Problem(path=("window",), message=message, hint="make it larger"))
    return problems


def sampler_graph(sampling: AnySampling, *, guidance_batch: bool = False) -> Graph:
    """The graph of a way of sampling: from noise to x0, with all steps. Those that make blocks collect them as `x0_blocks`.

    Args:
        guidance_batch: what `auto` means here.

    Example:
        >>> sampler_graph(StudentSampling()).ports, sampler_graph(TeacherSampling(steps=2)).outputs
        (('denoiser',), ('x0',))
    """
    whole = {"last_step_only": True} if isinstance(sampling, StudentSampling) else {}
    return Graph.from_spec(sampling.spec, **whole, **_params(sampling, guidance_batch)).subgraph(["x0"])


def is_causal(sampling: AnySampling) -> bool:
    """Whether it makes a video block by block.

    Example:
        >>> is_causal(StudentSampling()), is_causal(TeacherSampling())
        (True, False)
    """
    return isinstance(sampling, StudentSampling | CausalOdeSampling)


def change_method(values: dict[str, Any], method: str) -> dict[str, Any]:
    """Options for another method: what both have in common stays, the rest is the other's default.

    Example:
        >>> change_method({"method": "few_step", "steps": [1000, 500], "shift": 3.0, "window": 9}, "causal_ode")
        {'shift': 3.0, 'window': 9, 'method': 'causal_ode'}
    """
    old, new = (attrs.fields_dict(METHODS[name]) for name in (values.get("method", "few_step"), method))
    shared = {name for name in old.keys() & new.keys() if old[name].type == new[name].type}
    return {name: value for name, value in values.items() if name in shared and name != "method"} | {"method": method}


def _params(sampling: AnySampling, guidance_batch: bool) -> dict[str, Any]:
    """The parameters of its spec."""
    values = {name: value for name, value in attrs.asdict(sampling).items() if name != "method"}
    if values.get("guidance_batch") == "auto":
        values["guidance_batch"] = guidance_batch
    return values
