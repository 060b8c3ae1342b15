"""The evaluation of the digits task: real clips, teacher, student before and after, at 21 frames and late in a long rollout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from sftk.data.digits import DIRECTIONS, decode_latents, prompt_text
from sftk.data.digits_classifier import load_classifier
from sftk.data.digits_metrics import evaluate_clips, evaluate_real
from sftk.data.sources import source
from sftk.runtime.media import can_write_mp4, to_uint8, write_gif, write_mp4
from sftk.runtime.mesh import Mesh
from sftk.runtime.sampling import sample_latents
from sftk.runtime.sheets import contact_sheet, video_grid
from sftk.spec.sampling import AnyStudentSampling, StudentSampling, TeacherSampling, sampler_graph, sampling_problems
from sftk.spec.schema import at_least

FIGURES = "assets/digits/figures.json"
"""The shipped teacher's row, with the weights' hash, so that a run need not sample it anew."""


@attrs.frozen(kw_only=True)
class DigitsEvaluation:
    """Options of the evaluator `digits`.

    Args:
        student, teacher: roles; null leaves them out.
        before: judge the student before training, too, where it starts from weights.
        frames: length of every window that is judged; by default that of the recipe's latents.
        clips: how many are sampled, with prompts over all digits and directions.
        late_frames: length of the long rollout, whose last window is judged too; null leaves it out.
        drift_every: judge a window from every so many frames of the long rollout on; null judges its first and last only.
        batch: clips in one pass.
        seed: of the held-out noise.
        sample_prompts: prompts shown in the report.
        student_sampling, teacher_sampling: how they sample.
    """

    student: str | None = None
    teacher: str | None = None
    before: bool = True
    frames: int | None = attrs.field(default=None, validator=at_least(1))
    clips: int = attrs.field(default=400, validator=at_least(1))
    late_frames: int | None = attrs.field(default=63, validator=at_least(1))
    drift_every: int | None = attrs.field(default=None, validator=at_least(1))
    batch: int = attrs.field(default=50, validator=at_least(1))
    seed: int = 20_240_607
    sample_prompts: int = attrs.field(default=6, validator=at_least(0))
    student_sampling: AnyStudentSampling = attrs.field(factory=StudentSampling)
    teacher_sampling: TeacherSampling = attrs.field(factory=TeacherSampling)

    def problems(self, frames: int) -> Iterator[tuple[tuple[str | int, ...], str, str | None]]:
        """What is wrong with how student and teacher sample clips of `frames` frames: (path, message, hint)."""
        frames = self.frames or frames
        if self.student is not None:
            for problem in sampling_problems(self.student_sampling, frames):
                yield ("student_sampling", *problem.path), problem.message, problem.hint
            for problem in sampling_problems(self.student_sampling, self.late_frames or frames):
                if problem.path == ("frames_per_block",):
                    yield ("late_frames",), problem.message, problem.hint
        if self.teacher is not None:
            for problem in sampling_problems(self.teacher_sampling, frames):
                yield ("teacher_sampling", *problem.path), problem.message, problem.hint
        if self.late_frames is not None and self.late_frames < frames:
            message = f"a long rollout has at least the {frames} frames of a window, found {self.late_frames}"
            yield ("late_frames",), message, "make late_frames longer, or null to leave it out"
        if self.drift_every is not None and (self.late_frames or 0) <= frames:
            message = f"drift is judged along a rollout of more than {frames} frames, found late_frames {self.late_frames}"
            yield ("drift_every",), message, "make late_frames longer, or leave drift_every out"


Row = dict[str, Any]


def eval_prompts(count: int) -> list[str]:
    """Prompts over all digits and directions in turn.

    Example:
        >>> eval_prompts(2)
        ['a 0 moving left', 'a 1 moving right']
    """
    return [prompt_text(i % 10, DIRECTIONS[(i + i // 20) % len(DIRECTIONS)]) for i in range(count)]


@attrs.define(eq=False)
class DigitsEvaluator:
    """Judges models on the digits task.

    Args:
        options: what is judged.
        frames: length of a training clip, and of every window that is judged unless the options say another.
        device: where sampling runs.
        mesh: the ranks, which share the clips.
    """

    options: DigitsEvaluation
    frames: int
    device: torch.device
    mesh: Mesh = attrs.field(factory=Mesh.single)

    def __attrs_post_init__(self) -> None:
        self.frames = self.options.frames or self.frames

    @property
    def _shape(self) -> tuple[int, int, int]:
        shape = source("digits").sample_shape
        assert shape is not None
        return shape

    def student(self, port: Any, frames: int, prompts: list[str], seed: int | None = None) -> Tensor:
        """Frames [N, F, 16, 16] of the student's rollout."""
        graph = sampler_graph(self.options.student_sampling)
        return self._sample(graph, port, frames, prompts, seed)

    def teacher(self, port: Any, prompts: list[str], seed: int | None = None) -> Tensor:
        """Frames [N, F, 16, 16] of the teacher's ODE."""
        return self._sample(sampler_graph(self.options.teacher_sampling), port, self.frames, prompts, seed)

    def _sample(self, graph: Any, port: Any, frames: int, prompts: list[str], seed: int | None) -> Tensor:
        seed = self.options.seed if seed is None else seed
        shape = (frames, *self._shape)
        data = source("digits")
        batch = self.options.batch
        latents = sample_latents(graph, port, prompts, data, shape, seed=seed, device=self.device, batch=batch, mesh=self.mesh)
        return decode_latents(latents)

    def judge(self, video: Tensor, prompts: list[str]) -> Row:
        """The three metrics of the first window, and of the last one where the video is longer."""
        classifier = load_classifier("cpu")
        row: Row = dict(evaluate_clips(video[:, : self.frames], prompts, classifier=classifier))
        if video.shape[1] > self.frames:
            row["late"] = dict(evaluate_clips(video[:, -self.frames :], prompts, classifier=classifier))
        return row

    def drift(self, video: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        """The three metrics of a window from every `drift_every` frames of a video on, its last window among them.

        Returns:
            `start`, the windows' first frames, and a list of the same length for each metric.
        """
        assert self.options.drift_every is not None
        last = video.shape[1] - self.frames
        starts = sorted({*range(0, last + 1, self.options.drift_every), last})
        classifier = load_classifier("cpu")
        found = [evaluate_clips(video[:, at : at + self.frames], prompts, classifier=classifier) for at in starts]
        return {"start": list(starts), **{metric: [row[metric] for row in found] for metric in found[0]}}

    def student_row(self, port: Any, *, drift: bool = False) -> Row:
        """Metrics of a student: its first window and, where asked for, its last in a long rollout (one rollout serves both).

        With `drift`, and where the options ask for it, `drift` holds those of the windows between.
        """
        prompts = eval_prompts(self.options.clips)
        video = self.student(port, self.options.late_frames or self.frames, prompts)
        row = self.judge(video, prompts)
        return row | {"drift": self.drift(video, prompts)} if drift and self.options.drift_every else row

    def teacher_row(self, port: Any) -> Row:
        """Metrics of a teacher."""
        prompts = eval_prompts(self.options.clips)
        return self.judge(self.teacher(port, prompts), prompts)

    def real_row(self) -> Row:
        """Metrics of held-out real clips."""
        classifier = load_classifier("cpu")
        row: Row = dict(evaluate_real(self.options.clips, frames=self.frames, classifier=classifier))
        if self.options.late_frames:
            row["late"] = dict(evaluate_real(self.options.clips, frames=self.frames, seed=2, classifier=classifier))
        return row

    def write_samples(self, folder: Path, ports: dict[str, tuple[str, Any]], fps: float) -> dict[str, Tensor]:
        """Writes a GIF, an MP4 and contact sheets of the same prompts by several models; a student's long rollout as an array.

        Args:
            folder: where to.
            ports: caption to ("teacher" or "student", port).
            fps: pictures a second.

        Returns:
            caption to frames [N, F, 16, 16]; nothing on other ranks than the first.
        """
        prompts = [prompt_text(digit, direction) for digit, direction in zip((3, 8, 0, 5, 7, 2), DIRECTIONS * 2, strict=False)]
        prompts = prompts[: self.options.sample_prompts]
        if not prompts:
            return {}
        videos = {
            caption: self.teacher(port, prompts, seed=7)
            if kind == "teacher"
            else self.student(port, max(self.frames, self.options.late_frames or 0), prompts, seed=7)
            for caption, (kind, port) in ports.items()
        }
        if not self.mesh.first:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        for caption, (kind, _) in ports.items():
            if kind == "student":
                frames = np.stack([to_uint8(video) for video in videos[caption]])
                np.savez_compressed(folder / f"{caption}.npz", frames=frames, prompts=np.array(prompts))
        videos = {caption: video[:, : self.frames] for caption, video in videos.items()}
        if not videos:
            return {}
        rows = [(prompt, [video[i] for video in videos.values()]) for i, prompt in enumerate(prompts)]
        grid = video_grid(rows, list(videos))
        write_gif(folder / "side_by_side.gif", grid, fps, scale=1)
        if can_write_mp4():
            write_mp4(folder / "side_by_side.mp4", grid, fps, scale=1)
        sheet = [(f"{prompt}\n{caption}", video[i]) for i, prompt in enumerate(prompts) for caption, video in videos.items()]
        contact_sheet(folder / "contact_sheet.png", sheet, title="the same prompts, frame by frame")
        return videos


def shipped_teacher(weights: Path | None, options: DigitsEvaluation) -> tuple[Row, int] | None:
    """The row that ships for these teacher weights and sampling options, and the clips that it judged; None for others.

    Sampling the teacher with many steps takes minutes on a CPU, and its weights are fixed.
    """
    path = Path(__file__).parent.parent / FIGURES
    if weights is None or not weights.is_file() or not path.is_file():
        return None
    figures = json.loads(path.read_text())
    same = figures["weights_sha256"] == file_hash(weights) and _samples_alike(figures["teacher_sampling"], options)
    return (figures["teacher"], figures["clips"]) if same else None


def _samples_alike(told: dict[str, Any], options: DigitsEvaluation) -> bool:
    """Whether stored options say what an evaluation's do; one that they leave out had its default, or came later."""
    ours = options.teacher_sampling
    fields = attrs.fields_dict(type(ours))
    if not told.keys() <= fields.keys():
        return False
    # Whether both passes of guidance go in one call changes no result.
    return all(
        told.get(name, field.default) == getattr(ours, name) for name, field in fields.items() if name != "guidance_batch"
    )


def ship_teacher(weights: Path, summary: dict[str, Any], command: str) -> None:
    """Writes the figures of a run's teacher beside its weights, for `shipped_teacher`."""
    evaluation = summary["evaluation"]
    figures = {
        "weights_sha256": file_hash(weights),
        "command": command,
        "device": summary["device"],
        "torch": summary["torch"],
        "clips": evaluation["clips"],
        "teacher_sampling": evaluation["teacher_sampling"],
        "teacher": summary["teacher"],
    }
    (Path(__file__).parent.parent / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
