"""The data set `ode_pairs`: which pairs a recipe asks for, where they lie, and which states of a trajectory they keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs

from sftk.data.choices import Choice, FilePath, Finding
from sftk.data.embedders import text_shapes
from sftk.data.lmdb_layout import is_environment
from sftk.data.stored import StoredLatents, StoredPairs, check_stored
from sftk.errors import DataError, SftkError
from sftk.functional.schedule import TIMESTEPS, inference_timesteps, unshift_sigma, warp_steps


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _at_least(least: int):
    def check(instance: Any, attribute: Any, value: int) -> None:
        if value < least:
            raise ValueError(f"{attribute.name} must be at least {least}, found {value}")

    return check


@attrs.frozen(kw_only=True)
class PairTeacher:
    """The model whose trajectories are kept: a named size or a mapping of sizes, a weight file, a dtype."""

    size: str | dict[str, Any]
    weights: FilePath
    dtype: str = "fp32"


@attrs.frozen(kw_only=True)
class PairSolver:
    """Euler's method, see `specs/ode_trajectory.yaml`: number of steps, shift of the time axis, guidance scale."""

    steps: int = attrs.field(default=48, validator=_at_least(1))
    shift: float = 5.0
    guidance: float = 4.0


@attrs.frozen(kw_only=True)
class PairPlan:
    """Everything that decides what the pairs hold, and how the work is divided.

    Args:
        path: folder of the store; its shards are made in it.
        text: embeds the prompts, for the teacher and for whoever reads the pairs.
        count: how many pairs there are to be; None reads what is there.
        source: data set whose prompts (and, for given frames, clips) the pairs follow, in its order, again and again.
        teacher, solver: see `PairTeacher` and `PairSolver`.
        keep: timesteps of the student, from noise down to the clean state.
        keep_shift, keep_warp: the student's `shift` and `warp`.
        initial_frames: clean frames given at the start (image to video).
        shard: pairs of one LMDB environment.
        batch: pairs that are solved together; always the same ones.
        seed: of the noise.
        negative: the unconditional prompt.
        codec: decodes latents, for samples.
        skip_bad: leave out records that cannot be used, and list them.

    Raises:
        ValueError: a number is out of range.
    """

    path: str
    text: Choice
    count: int | None = attrs.field(default=None)
    source: dict[str, Any] | None = None
    teacher: PairTeacher | None = None
    solver: PairSolver = attrs.field(factory=PairSolver)
    keep: tuple[float, ...] = attrs.field(default=(1000, 750, 500, 250, 0), converter=_floats)
    keep_shift: float = 5.0
    keep_warp: bool = True
    initial_frames: int = attrs.field(default=0, validator=_at_least(0))
    shard: int = attrs.field(default=512, validator=_at_least(1))
    batch: int = attrs.field(default=32, validator=_at_least(1))
    seed: int = 0
    negative: str = ""
    codec: Choice | None = None
    skip_bad: bool = False

    def __attrs_post_init__(self) -> None:
        if not self.keep or self.keep[-1] != 0:
            raise ValueError(f"keep must end with 0, the clean state, found {list(self.keep)}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, found {self.count}")
        if self.teacher is not None and (self.count is None or self.source is None):
            raise ValueError("pairs with a `teacher` need `count` and `source`")

    def folder(self, shard: int) -> Path:
        """Where a shard lies. Names are padded, so that they sort as numbers do."""
        return Path(self.path) / f"shard_{shard:05d}"

    @property
    def shards(self) -> int:
        """How many environments the pairs fill."""
        assert self.count is not None
        return -(-self.count // self.shard)

    def in_shard(self, shard: int) -> int:
        """Pairs that a shard is to hold."""
        assert self.count is not None
        return min(self.shard, self.count - shard * self.shard)

    def batches(self, shard: int, done: int = 0) -> Iterator[tuple[tuple[int, ...], int, int]]:
        """Batches of a shard that are still to be solved: sample indices, and which part of them to write, as a range.

        The batches do not depend on what is done or on `count`, so that every record comes out of the same batch.

        Example:
            >>> plan = PairPlan(path="pairs", text="digits", count=7, shard=5, batch=2)
            >>> list(plan.batches(0, done=3))
            [((2, 3), 1, 2), ((4,), 0, 1)]
            >>> list(plan.batches(1))
            [((5, 6), 0, 2)]
        """
        first, wanted = shard * self.shard, self.in_shard(shard)
        for start in range(0, wanted, self.batch):
            end = min(start + self.batch, self.shard)
            if end > done:
                yield tuple(range(first + start, first + end)), max(done - start, 0), min(end, wanted) - start

    def states(self) -> tuple[int, ...]:
        """Which states of the trajectory are kept: 0 is the noise, `solver.steps` the clean end."""
        return nearest_states(self.keep, self.solver, self.keep_shift, self.keep_warp)


def nearest_states(keep: Sequence[float], solver: PairSolver, shift: float = 1.0, warp: bool = False) -> tuple[int, ...]:
    """Grid points of a solver nearest to a student's timesteps.

    Distances are measured on the solver's own, even axis (before its shift), in grid steps.

    Args:
        keep: the student's step list, descending.
        solver: its grid.
        shift, warp: the student's.

    Returns:
        An index into the solver's timesteps for each, descending in time.

    Raises:
        DataError: the nearest grid point is further than one step away, or two timesteps share one.

    Example:
        >>> nearest_states((1000, 750, 500, 250, 0), PairSolver(steps=48, shift=3.0), shift=3.0, warp=True)
        (0, 12, 24, 36, 48)
    """
    try:
        wanted = warp_steps(keep, shift, warp)
    except SftkError as error:
        raise DataError(f"keep: {error}") from error
    places = [solver.steps * (1 - unshift_sigma(time / TIMESTEPS, solver.shift)) for time in wanted]
    grid = (*inference_timesteps(solver.steps, solver.shift), 0.0)
    found = tuple(min(range(len(grid)), key=lambda index: abs(index - place)) for place in places)
    for time, place, index in zip(keep, places, found, strict=True):
        if abs(index - place) > 1:
            raise DataError(f"keep: {time:g} lies {abs(index - place):.1f} steps from the solver's nearest grid point")
    for index, (time, after) in enumerate(pairwise(keep)):
        if found[index] == found[index + 1]:
            raise DataError(
                f"keep: {time:g} and {after:g} fall on one grid point of a solver with {solver.steps} steps; give it more steps"
            )
    return found


def open_pairs(plan: PairPlan, *, frames: int, channels: int, height: int, width: int, seed: int = 0) -> StoredPairs:
    """The pairs of a store as a data set. Making them is the runner's business.

    Raises:
        DataError: the store cannot be used, or is not complete.
    """
    shape: dict[str, Any] = {"frames": frames, "channels": channels, "height": height, "width": width}
    data = StoredLatents(plan.path, text=plan.text, negative=plan.negative, skip_bad=plan.skip_bad, **shape)
    return StoredPairs(data=data, steps=len(plan.keep), size=plan.count)


def pairs_shapes(plan: PairPlan, *, frames: int, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a sample's tensors, known without the store."""
    clip = (frames, channels, height, width)
    return {"ode_latents": (len(plan.keep), *clip), "latents": clip, **text_shapes(plan.text)}


def check_pairs(plan: PairPlan, *, frames: int, channels: int, height: int, width: int) -> None:
    """Checks pairs that are there already against a recipe's latents, by what their shards say of themselves.

    Raises:
        DataError: the store cannot be used, or holds latents of another size or another number of states.
    """
    shape: dict[str, Any] = {"frames": frames, "channels": channels, "height": height, "width": width}
    path, made_here = Path(plan.path), plan.teacher is not None
    if made_here and not is_environment(path):
        # Shards that another process is just making, or that one left half made, are no mistake: the stage makes them.
        for folder in (plan.folder(shard) for shard in range(plan.shards)):
            if is_environment(folder):
                check_stored(path=str(folder), steps=len(plan.keep), skip_bad=True, **shape)
        return
    check_stored(path=plan.path, steps=len(plan.keep), skip_bad=plan.skip_bad, **shape)


def plan_findings(plan: PairPlan) -> Iterator[Finding]:
    """What is wrong with a plan besides the types of its values."""
    if plan.count is not None and plan.teacher is not None:
        try:
            plan.states()
        except DataError as error:
            yield ("keep",), str(error), None
