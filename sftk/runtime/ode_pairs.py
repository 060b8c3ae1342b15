"""Makes ODE pairs: a teacher's solver runs from keyed noise, and the states that a student needs go into a sharded store.

A process claims a shard with a file lock, which ends with the process, and adds one batch in one transaction. So it may be
killed at any moment and started again, and several processes may work on one store.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from sftk.core.graph import Graph
from sftk.data.choices import call
from sftk.data.embedders import make_embedder
from sftk.data.lmdb_layout import is_environment, read_about, read_header
from sftk.data.lmdb_writer import ShardWriter, check_about
from sftk.data.ode_pairs import PairPlan
from sftk.data.sources import source
from sftk.errors import DataError, SftkError
from sftk.functional.keys import Key
from sftk.functional.schedule import inference_timesteps
from sftk.models.config import WanConfig, preset
from sftk.models.tensor_files import split_entry
from sftk.models.weight_folders import transformer_folder
from sftk.models.weights import build_model, read_config
from sftk.runtime.device import pick_device, set_precision
from sftk.runtime.port import Port
from sftk.spec.data_files import change_files, found_files, named_files
from sftk.spec.recipe import Stage
from sftk.spec.schema import AUTO, LatentsSection

_POLL = 0.5
_EDGE = 2**24

Make = Callable[[Sequence[int]], tuple[Tensor, list[str]]]
"""Sample indices to states [B, S, F, C, H, W] and prompts."""


@attrs.frozen(kw_only=True)
class PairJob:
    """The pairs that a stage asks for.

    Args:
        plan: its data section.
        latents: size of a clip.
        about: what decides the records' contents, as the shards keep it.
        make: gives a `Make`; called when the first pair is missing, so that a complete store loads no teacher.
    """

    plan: PairPlan
    latents: LatentsSection
    about: Mapping[str, Any]
    make: Callable[[], Make]

    @property
    def record_shape(self) -> tuple[int, ...]:
        """S, F, C, H, W."""
        latents = self.latents
        return len(self.plan.keep), latents.frames, latents.channels, latents.height, latents.width

    def present(self) -> dict[int, int]:
        """Shard to the number of records in it. A shard that is just being made counts as empty.

        Raises:
            DataError: a shard was made with other settings.
        """
        return {shard: self._count(shard) for shard in range(self.plan.shards)}

    def _count(self, shard: int) -> int:
        folder = self.plan.folder(shard)
        if not is_environment(folder):
            return 0
        try:
            count, about = read_header(folder).count, read_about(folder)
        except DataError:
            return 0
        if count:
            check_about(folder, about, self.about)
        return count


def pair_job(stage: Stage) -> PairJob | None:
    """The pairs that a stage's data section asks for; None when it makes none."""
    recipe = stage.recipe
    options = found_files("ode_pairs", recipe.data.with_, stage.path)
    plan = call("data", PairPlan, options)
    if plan.teacher is None or is_environment(Path(plan.path)):
        return None
    assert isinstance(plan, PairPlan) and plan.source is not None
    named = change_files(options, named_files("ode_pairs", options), file_digest)
    solver = attrs.asdict(plan.solver)
    times = (*inference_timesteps(plan.solver.steps, plan.solver.shift), 0.0)
    about = {
        "teacher": named["teacher"],
        "solver": solver,
        "times": [times[index] for index in plan.states()],
        "source": named["source"],
        "text": named["text"],
        "negative": plan.negative,
        "initial_frames": plan.initial_frames,
        "seed": plan.seed,
        "shard": plan.shard,
        "precision": recipe.precision,
    }
    make = functools.cache(lambda: TeacherPairs(plan, recipe.latents, pick_device(recipe.device), recipe.precision))
    return PairJob(plan=plan, latents=recipe.latents, about=about, make=make)


class TeacherPairs:
    """Runs the teacher's solver for samples, each with noise of its own.

    Args:
        plan: source, teacher, solver and states, with files found.
        latents: size of a clip.
        device: where the teacher lives.
        precision: in which it computes.

    Raises:
        CheckpointError: the teacher's weights do not fit.
        DataError: the source has no prompts, or no frames to give.
    """

    def __init__(self, plan: PairPlan, latents: LatentsSection, device: torch.device, precision: Any):
        assert plan.teacher is not None and plan.source is not None
        self.plan, self.device = plan, device
        self.shape = (latents.frames, latents.channels, latents.height, latents.width)
        found = source(str(plan.source["use"]))
        self.source = found.build(**attrs.asdict(latents), seed=plan.seed, options=plan.source.get("with") or {})
        self.embed = make_embedder(plan.text)
        self.states = plan.states()
        self.graph = Graph.from_spec("specs/ode_trajectory.yaml", **attrs.asdict(plan.solver))
        config = _config(plan.teacher.size, Path(plan.teacher.weights))
        found_sizes, wanted = (latents.channels, self.embed.shape[1]), (config.in_dim, config.text_dim)
        if found_sizes != wanted:
            raise DataError(
                f"the teacher takes latents of {wanted[0]} channels and prompt embeddings of width {wanted[1]}; "
                f"found {found_sizes[0]} in the recipe and {found_sizes[1]} from the text embedder"
            )
        model = build_model(
            config,
            weights=Path(plan.teacher.weights),
            seed=0,
            dtype=plan.teacher.dtype,
            backend="auto",
            device=device,
        )
        self.port = Port(model.requires_grad_(False), set_precision(precision))

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """States [B, S, F, C, H, W], noisiest first, and prompts."""
        samples = [self.source[index % len(self.source)] for index in indices]
        if "prompt" not in samples[0]:
            raise DataError("the source of ODE pairs has no prompts; take a data set such as `prompts`")
        prompts = [sample["prompt"] for sample in samples]
        noise = Key(seed=self.plan.seed, phase="ode_pairs", samples=tuple(indices)).normal(
            "noise", self.shape, device=self.device
        )
        values: dict[str, Any] = {
            "noise": noise,
            "prompt_embeds": self.embed(prompts).to(self.device),
            "negative_embeds": self.embed([self.plan.negative] * len(prompts)).to(self.device),
        }
        given = self._given(samples)
        if given is not None:
            values["initial_latents"] = given
        states = (noise, *self.graph.run(values, {"denoiser": self.port})["states"])
        kept = torch.stack([states[index] for index in self.states], dim=1)
        if given is not None:
            kept[:, :, : given.shape[1]] = given[:, None]
        return kept, prompts

    def _given(self, samples: Sequence[Mapping[str, Any]]) -> Tensor | None:
        count = self.plan.initial_frames
        if count == 0:
            return None
        key = next((key for key in ("initial_latents", "latents") if key in samples[0]), None)
        if key is None or samples[0][key].shape[0] < count:
            raise DataError(f"initial_frames is {count}, but the source of the ODE pairs gives no {count} clean frames")
        return torch.stack([sample[key][:count] for sample in samples]).to(self.device)


def make_pairs(job: PairJob, report: Callable[[int], None]) -> int:
    """Makes the pairs that are missing, together with whoever else works on the store, and returns when all are there.

    Args:
        job: from `pair_job`.
        report: called with the number of pairs in the store whenever it grows.

    Returns:
        How many this process made.

    Raises:
        DataError: the store was made with other settings, or a pair is not finite.
    """
    present, made = job.present(), 0
    waiting = [shard for shard in range(job.plan.shards) if present[shard] < job.plan.in_shard(shard)]
    while waiting:
        busy = []
        for shard in waiting:
            claimed = False
            for count in _fill_shard(job, shard):
                made += count - present[shard] if claimed else 0
                present[shard], claimed = count, True
                report(sum(present.values()))
            if not claimed:
                busy.append(shard)
        if len(busy) == len(waiting):
            time.sleep(_POLL)
            present |= {shard: max(present[shard], job._count(shard)) for shard in busy}
            report(sum(present.values()))
        waiting = busy
    return made


def _fill_shard(job: PairJob, shard: int) -> Iterator[int]:
    """Fills a shard, yielding the records in it at first and after each batch; nothing when another process works on it."""
    folder = job.plan.folder(shard)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "claim.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return
    try:
        with ShardWriter(folder, job.record_shape, sharded=True, about=job.about) as writer:
            yield writer.count
            for indices, first, last in job.plan.batches(shard, writer.count):
                latents, prompts = job.make()(indices)
                writer.append(list(latents[first:last]), prompts[first:last])
                yield writer.count
    finally:
        lock.release()


def file_digest(name: str) -> str:
    """A file's name and a digest of its size and of its first and last 16 MiB: enough to tell weight files apart.

    Of a folder, those of its safetensors files; an entry (`file.pt:<entry>`) counts, too.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = file.write_text("x")
        >>> file_digest(str(file))
        'a.txt a048e640908046be'
    """
    path, entry = split_entry(name)
    digest = hashlib.sha256(entry.encode() if entry else b"")
    for part in sorted(transformer_folder(path).glob("*.safetensors")) if path.is_dir() else [path]:
        size = part.stat().st_size
        digest.update(str(size).encode())
        with part.open("rb") as file:
            digest.update(file.read(_EDGE))
            if size > _EDGE:
                file.seek(max(_EDGE, size - _EDGE))
                digest.update(file.read(_EDGE))
    return f"{path.name} {digest.hexdigest()[:16]}"


def _config(size: str | Mapping[str, Any], weights: Path) -> WanConfig:
    if size == AUTO:
        return read_config(weights)
    if isinstance(size, str):
        return preset(size)
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in size.items()}
    try:
        return WanConfig(**lists)
    except (TypeError, ValueError) as error:
        raise SftkError(f"data.with.teacher.size: {error}") from error
