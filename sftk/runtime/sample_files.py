"""Videos into files, block by block, with what that took; `sftk sample` is this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from sftk.errors import SftkError
from sftk.runtime.device import device_name
from sftk.runtime.media import can_write_mp4, open_mp4, to_uint8, write_gif
from sftk.runtime.sample_meter import SampleMeter
from sftk.runtime.sampler import Sampler, batches
from sftk.runtime.sheets import contact_sheet
from sftk.runtime.starts import save_latents
from sftk.spec.convert import unstructure

SUFFIXES = (".gif", ".mp4", ".png", ".safetensors")


@attrs.frozen(kw_only=True)
class Clip:
    """A video to make: its prompt, the text that is embedded for it (a longer one, where there is one), seed and file."""

    prompt: str
    text: str
    seed: int
    path: Path


def clip_files(out: Path, count: int) -> list[Path]:
    """Files for so many videos: numbered where there are several.

    Raises:
        SftkError: the suffix is none that can be written here.

    Example:
        >>> [path.name for path in clip_files(Path("out.gif"), 2)]
        ['out_0.gif', 'out_1.gif']
    """
    if out.suffix not in SUFFIXES:
        raise SftkError(f"cannot write {out.name!r}; expected a name that ends in {', '.join(SUFFIXES)}")
    if out.suffix == ".mp4" and not can_write_mp4():
        raise SftkError("writing MP4 needs PyAV (pip install av); or take a name that ends in .gif")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}_{index}") for index in range(count)]


def write_samples(
    sampler: Sampler,
    clips: Sequence[Clip],
    *,
    batch: int = 1,
    frames: int | None = None,
    initial: Callable[[], Tensor] | None = None,
    latents: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Makes the clips, a batch after the other, and writes each into its file as it is made.

    Args:
        batch: clips that are made together.
        frames: latent frames to make; by default as many as in training.
        initial: gives the latents that the clips begin with, [1 or N, F0, C, H, W].
        latents: write them beside the pictures, as `.safetensors`; a clip of that suffix has no pictures.
        note: called with a line for each file.

    Returns:
        What was made and what it took, as plain values: `videos`, `seconds` and `peak_memory_bytes` by part,
        `first_block_latency` (of the first batch) in seconds and `frames_per_second` (of all videos together).

    Raises:
        SftkError: see `Sampler.stream`.
    """
    meter = SampleMeter(sampler.device)
    decode = clips[0].path.suffix != ".safetensors"
    with meter.part("text"):
        sampler.prepare([clip.text for clip in clips], decode=decode)
    with meter.part("load"):
        _ = sampler.port
    given = None
    if initial is not None:
        with meter.part("encode"):
            given = initial()
    made, spent, latency, videos = 0, 0.0, None, []
    for rows in batches(len(clips), batch):
        part = clips[rows.start : rows.stop]
        start = given if given is None or given.shape[0] == 1 else given[rows.start : rows.stop]
        with meter.part("sample"):
            stream = sampler.stream(
                [clip.text for clip in part],
                frames=frames,
                seeds=[clip.seed for clip in part],
                initial_latents=start,
                decode=decode,
            )
            keep = latents or not decode
            with ExitStack() as open_files:
                writers = [open_files.enter_context(_writer(clip, sampler.options.fps)) for clip in part] if decode else []
                kept = []
                for block in stream:
                    for write, video in zip(writers, block, strict=False):
                        write(video)
                    if keep and stream.latents is not None:
                        kept.append(stream.latents.float().cpu())
        made, spent = made + stream.frames * len(part), spent + stream.seconds
        latency = stream.latency if latency is None else latency
        whole = torch.cat(kept, dim=1) if keep else [None] * len(part)
        for clip, one in zip(part, whole, strict=True):
            found = {"file": str(clip.path), "prompt": clip.prompt, "seed": clip.seed, "frames": stream.frames}
            if one is not None:
                file = clip.path.with_suffix(".safetensors")
                save_latents(file, one, _about(sampler, clip))
                found |= {"latents": str(file)}
            videos.append(found)
            note(f"{clip.path}: {clip.prompt} ({stream.frames} frames, seed {clip.seed}, {sampler.weights})")
    facts = {"device": device_name(sampler.device), "weights": str(sampler.weights), "precision": sampler.options.precision}
    speed = {"first_block_latency": latency, "frames_per_second": made / spent if spent else None}
    return {"videos": videos, "sampling": unstructure(sampler.options.sampling), **facts, **speed, **meter.report()}


def _about(sampler: Sampler, clip: Clip) -> dict[str, Any]:
    options = sampler.options
    facts = {"prompt": clip.prompt, "text": clip.text, "seed": clip.seed, "fps": options.fps, "weights": str(sampler.weights)}
    return facts | {"negative": options.negative, "sampling": unstructure(options.sampling)}


@contextmanager
def _writer(clip: Clip, fps: float) -> Iterator[Callable[[Tensor], None]]:
    """A function that takes the next frames [m, H, W] or [m, 3, H, W]; the file is there at the end."""
    if clip.path.suffix == ".mp4":
        with open_mp4(clip.path, fps) as write:
            yield lambda video: write(_channels_last(video))
        return
    parts: list[np.ndarray] = []
    yield lambda video: parts.append(to_uint8(_channels_last(video)))
    whole = np.concatenate(parts)
    if clip.path.suffix == ".gif":
        write_gif(clip.path, whole, fps)
    else:
        contact_sheet(clip.path, [(clip.prompt, whole)])


def _channels_last(video: Tensor) -> Tensor:
    return video.permute(0, 2, 3, 1) if video.dim() == 4 else video
