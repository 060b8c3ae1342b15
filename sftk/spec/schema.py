"""What a recipe of one stage may say. Unknown keys are errors; every default is written here."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from sftk.data.choices import Choice
from sftk.functional.attention import Backend
from sftk.models.branch import BranchConfig
from sftk.models.config import PRESETS, WanConfig, preset
from sftk.spec.lowp import LowpSection, ModelLowp
from sftk.spec.optimizer import OptimizerSection
from sftk.spec.parallel import ModelParallel, ParallelSection
from sftk.spec.sampling import SampleSection
from sftk.spec.validators import above, at_least, plain_name, within

Checkpoint = Literal["none", "full", "selective", "products"]
"""What a block keeps for its backward pass, see `sftk.runtime.activations`."""

AUTO = "auto"
"""The size of a model that is read from its weights."""

SEEDS = 2**32
"""How many seeds there are."""


def _share(instance: Any, attribute: Any, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{attribute.name} must lie in [0, 1], found {value}")


def _distinct_roles(instance: Any, attribute: Any, value: str | tuple[str, ...]) -> None:
    if not value or (isinstance(value, tuple) and len(set(value)) < len(value)):
        raise ValueError(
            f"a phase updates different roles, at least one, found {list(value) if isinstance(value, tuple) else repr(value)}"
        )


def _known_size(instance: Any, attribute: Any, value: Any) -> None:
    if isinstance(value, str) and value not in (AUTO, *PRESETS):
        known = ", ".join([*sorted(PRESETS), AUTO])
        raise ValueError(f"unknown model size {value!r}, expected one of {known} or a mapping of sizes")


@attrs.frozen(kw_only=True)
class LatentsSection:
    """Size of one sample's latents; `sftk.core.LatentShape` in a recipe."""

    frames: int = attrs.field(validator=at_least(1))
    channels: int = attrs.field(validator=at_least(1))
    height: int = attrs.field(validator=at_least(1))
    width: int = attrs.field(validator=at_least(1))


@attrs.frozen(kw_only=True)
class DataSection:
    """Where batches come from: a registered data set and its options. `workers` 0 reads in the training process."""

    use: str
    with_: dict[str, Any] = attrs.field(factory=dict)
    workers: int = attrs.field(default=0, validator=at_least(0))


@attrs.frozen(kw_only=True)
class ModelSection:
    """A model: its size, its weights (a file or folder, or `<stage>/<role>` of an earlier stage; null starts from random ones).

    The size `auto` is that of the weights; reading a recipe puts it in place, see `sftk.spec.sizes`.
    Instead of a size, `ema_of` is another role's average, `branch_of` a classifier branch on another role's hidden states, of
    the size `branch`, `builtin` a frozen module of the package, see `sftk.data.builtins`, and `codec` a codec, frozen, too.
    """

    size: str | WanConfig | None = attrs.field(default=None, validator=_known_size)
    weights: str | None = None
    ema_of: str | None = None
    branch_of: str | None = None
    branch: BranchConfig | None = None
    builtin: str | None = None
    codec: Choice | None = None
    backend: Backend = "auto"
    checkpoint: Checkpoint = "none"
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    half_copy: bool = False
    lowp: ModelLowp = attrs.field(factory=ModelLowp)
    parallel: ModelParallel = attrs.field(factory=ModelParallel)

    def __attrs_post_init__(self) -> None:
        if [self.size, self.ema_of, self.branch_of, self.builtin, self.codec].count(None) != 4:
            raise ValueError("a model has one of `size`, `ema_of`, `branch_of`, `builtin` and `codec`")
        if self.size == AUTO and self.weights is None:
            raise ValueError("size: auto is read from `weights`, which this model lacks; name them, or a size")
        if (self.branch is None) != (self.branch_of is None):
            raise ValueError("a classifier branch has both `branch_of`, the role that it reads, and `branch`, its size")
        if self.branch is not None and self.checkpoint != "none":
            raise ValueError("a classifier branch has no blocks to `checkpoint`; set it on the role that it reads")
        if self.half_copy and self.size is None:
            raise ValueError("`half_copy` is for a model of a size of its own; leave it out")
        untouched = (self.weights, self.backend, self.checkpoint, self.dtype) == (None, "auto", "none", "fp32")
        if self.ready_made and not (untouched and self.parallel == ModelParallel()):
            kind = "built-in model" if self.codec is None else "codec"
            kept = "`weights`, `backend`, `checkpoint`, `dtype` and `parallel`"
            raise ValueError(f"a {kind} comes as it is, without {kept}")
        if self.size is None and self.lowp != ModelLowp():
            raise ValueError("`lowp` is for a model of a size of its own; an average computes as its role does")
        if self.ema_of is not None and self.parallel != ModelParallel():
            raise ValueError(f"an average lies where {self.ema_of!r} does; say `parallel` there")

    @property
    def ready_made(self) -> bool:
        """Whether it comes frozen and without a port around it: a built-in module or a codec."""
        return self.builtin is not None or self.codec is not None

    @property
    def config(self) -> WanConfig:
        """The size as a config; not of `auto`, before it is put in place."""
        assert self.size is not None
        assert self.size != AUTO
        return preset(self.size) if isinstance(self.size, str) else self.size


@attrs.frozen(kw_only=True)
class PhaseSection:
    """One phase of a training step: a graph, the loss to minimise and the roles that it updates.

    `every: 5` runs it on each fifth step. `in` binds a graph input to a key of the data or to `<phase>.<output>` of an
    earlier phase. `models` binds the graph's roles to the recipe's. `log` names further outputs to write down. `backward:
    replay` runs the steps of a rollout without a graph, and again with one when the loss is known, see `sftk.core.replayed`.
    Without `graph`, Python gives one, see `run_recipe`.
    """

    name: str = attrs.field(validator=plain_name)
    graph: str | None = None
    update: str | tuple[str, ...] = attrs.field(validator=_distinct_roles)
    every: int = attrs.field(default=1, validator=at_least(1))
    loss: str = "loss"
    clip: float | None = attrs.field(default=None, validator=above(0))
    backward: Literal["graph", "replay"] = "graph"
    in_: dict[str, str] = attrs.field(factory=dict)
    models: dict[str, str] = attrs.field(factory=dict)
    with_: dict[str, Any] = attrs.field(factory=dict)
    log: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """The updated roles."""
        return (self.update,) if isinstance(self.update, str) else self.update


@attrs.frozen(kw_only=True)
class TrainSection:
    """How long to train."""

    steps: int = attrs.field(validator=at_least(0))


@attrs.frozen(kw_only=True)
class BatchSection:
    """Samples of one update (`global`), and of one forward pass on one rank (`per_rank`; by default the rank's whole share)."""

    global_: int = attrs.field(validator=at_least(1))
    per_rank: int | None = attrs.field(default=None, validator=at_least(1))

    def split(self, ranks: int = 1) -> tuple[int, int]:
        """Samples of one forward pass on each of `ranks` ranks with samples of their own, and forward passes of an update.

        Raises:
            ValueError: `global` does not split so.

        Example:
            >>> BatchSection(global_=64, per_rank=1).split(16), BatchSection(global_=64).split(16)
            ((1, 4), (4, 1))
        """
        per_rank = self.per_rank or max(self.global_ // ranks, 1)
        if self.global_ % (per_rank * ranks):
            raise ValueError(f"global {self.global_} does not split into passes of {per_rank} on each of {ranks} ranks")
        return per_rank, self.global_ // (per_rank * ranks)

    def __attrs_post_init__(self) -> None:
        if self.per_rank is not None and self.global_ % self.per_rank:
            raise ValueError(f"global {self.global_} must be a multiple of per_rank {self.per_rank}")


@attrs.frozen(kw_only=True)
class EmaSection:
    """Exponential moving average of a role's weights, kept from step `start` on."""

    decay: float = attrs.field(validator=_share)
    start: int = attrs.field(default=0, validator=at_least(0))


@attrs.frozen(kw_only=True)
class EvalSection:
    """The evaluation at the end of a run: a registered evaluator and its options."""

    use: str
    enabled: bool = True
    with_: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class CheckpointSection:
    """A checkpoint each `every` steps (and at the end); the last `keep` are kept.

    `background` copies what is to be saved to the host's memory and writes it while training goes on; else training waits.
    """

    every: int = attrs.field(default=500, validator=at_least(1))
    keep: int = attrs.field(default=2, validator=at_least(1))
    background: bool = True


@attrs.frozen(kw_only=True)
class WandbSection:
    """Weights & Biases."""

    project: str = "sftk"
    mode: Literal["online", "offline", "disabled"] = "online"
    name: str | None = None


@attrs.frozen(kw_only=True)
class TrackSection:
    """Where numbers go besides `metrics.jsonl`."""

    tensorboard: bool = True
    wandb: WandbSection | None = None


@attrs.frozen(kw_only=True)
class FetchSection:
    """Where files that a recipe names can be had: a Hugging Face repository (`files` of it, or all), a command, or their user.

    The key in a recipe's `fetch` is the folder that the download or the command makes; files of a repository keep their path in
    it. `command` is shown, never run; `own` says in words what the user has to put there.
    """

    repo: str | None = None
    files: tuple[str, ...] = ()
    command: str | None = None
    own: str | None = None

    def __attrs_post_init__(self) -> None:
        if [self.repo, self.command, self.own].count(None) != 2:
            raise ValueError("files come from one of `repo`, `command` and `own`")
        if self.files and self.repo is None:
            raise ValueError("`files` are those of a `repo`")


@attrs.frozen(kw_only=True)
class Recipe:
    """One stage of training, complete. See `docs/recipes.md`."""

    version: Literal[1]
    doc: str = ""
    seed: int = attrs.field(default=0, validator=within(0, SEEDS))
    compat: Literal["self_forcing"] | None = None
    plugins: tuple[str, ...] = ()
    latents: LatentsSection
    data: DataSection
    models: dict[str, ModelSection]
    optimizers: dict[str, OptimizerSection]
    phases: tuple[PhaseSection, ...]
    train: TrainSection
    batch: BatchSection
    share_rollout: bool = False
    ema: dict[str, EmaSection] = attrs.field(factory=dict)
    fetch: dict[str, FetchSection] = attrs.field(factory=dict)
    eval: EvalSection | None = None
    sample: SampleSection = attrs.field(factory=SampleSection)
    checkpoint: CheckpointSection = attrs.field(factory=CheckpointSection)
    parallel: ParallelSection = attrs.field(factory=ParallelSection)
    track: TrackSection = attrs.field(factory=TrackSection)
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = "fp32"
    lowp: LowpSection = attrs.field(factory=LowpSection)
    compile: Literal["auto"] | bool = "auto"
    cuda_graphs: Literal["auto"] | bool = "auto"
    triton_kernels: Literal["auto"] | bool = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
