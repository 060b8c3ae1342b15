"""What a video begins with: an image, the end of a video, or latents that were written before."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sftk.data.codecs import Codec
from sftk.data.latent_sizes import check_size
from sftk.data.pictures import cover
from sftk.errors import DataError, SftkError, ShapeError
from sftk.functional.plan import split_given
from sftk.runtime.media import complete_file
from sftk.runtime.sampler import Sampler
from sftk.spec.sampling import CausalOdeSampling, StudentSampling

LATENTS = "latents"
"""Name of the tensor in a file of latents."""


def image_latents(sampler: Sampler, path: Path) -> Tensor:
    """[1, 1, C, H, W]: the latents of a picture, scaled to cover the video's size and cut at the centre.

    Raises:
        DataError: the file is missing or no whole image.
        SftkError: nothing says how pictures become latents.
    """
    try:
        with Image.open(path) as image:
            picture = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error
    return _encoded(sampler, picture)


def video_latents(sampler: Sampler, path: Path, keep: int | None = None) -> Tensor:
    """[1, F0, C, H, W]: the latents of a video's end, at the sampler's rate and size.

    Args:
        keep: latent frames; by default as many whole blocks as the video holds, at most as many as in training.

    Raises:
        DataError: the file cannot be decoded, or is shorter than that.
        SftkError: nothing says how pictures become latents.
    """
    from sftk.data.video import sample_pictures  # needs PyAV

    codec = _codec(sampler)
    most = keep or sampler.options.latents.frames
    pictures: deque[np.ndarray] = deque(maxlen=codec.pixel_frames(most))
    pictures.extend(sample_pictures(path, sampler.options.fps))
    held = next((frames for frames in range(most, 0, -1) if codec.pixel_frames(frames) <= len(pictures)), 0)
    found = held if keep is None else keep if held == keep else 0
    while found and keep is None and not _fits(sampler, found):
        found -= 1
    if found == 0:
        wanted = codec.pixel_frames(keep or 1)
        raise DataError(f"{path} has {len(pictures)} pictures at {sampler.options.fps:g} a second, expected at least {wanted}")
    taken = np.stack(list(pictures)[-codec.pixel_frames(found) :])
    return _encoded(sampler, torch.from_numpy(taken).permute(0, 3, 1, 2).float() / 255)


def save_latents(path: Path, latents: Tensor, about: Mapping[str, Any]) -> None:
    """Writes a video's latents [F, C, H, W] as safetensors, with facts about them in the metadata (as JSON).

    Example: see `read_latents`.
    """
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    with complete_file(path) as part:
        save_file({LATENTS: latents.detach().cpu().contiguous()}, part, metadata=metadata)


def read_latents(path: Path, keep: int | None = None, size: Sequence[int] = ()) -> Tensor:
    """[1, F0, C, H, W] float32: latents that `save_latents` wrote, or their last `keep` frames.

    Args:
        path: the file.
        keep: frames; None takes all.
        size: C, H, W that they are to have, of a recipe; any by default.

    Raises:
        DataError: the file is missing, broken or holds something else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "clip.safetensors"
        >>> save_latents(path, torch.zeros(6, 4, 8, 8), {"prompt": "a 3 moving left"})
        >>> read_latents(path, keep=3).shape
        torch.Size([1, 3, 4, 8, 8])
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = tuple(file.keys())
            if LATENTS not in names:
                raise DataError(f"{path} holds {', '.join(sorted(names))}; expected {LATENTS!r}, as --latents writes it")
            latents = file.get_tensor(LATENTS).float()
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the latents {path}: {error}") from error
    if latents.dim() != 4:
        raise DataError(f"{path}: {LATENTS!r} has shape {list(latents.shape)}; expected [F, C, H, W]")
    if keep is not None and latents.shape[0] < keep:
        raise DataError(f"{path} has {latents.shape[0]} latent frames, expected at least {keep}")
    if size:
        check_size(f"{path} holds", latents.shape, size, "name a file of that size")
    return latents[None] if keep is None else latents[None, -keep:]


def _fits(sampler: Sampler, frames: int) -> bool:
    """Whether so many given frames are whole blocks."""
    sampling = sampler.options.sampling
    if not isinstance(sampling, StudentSampling | CausalOdeSampling):
        return True
    try:
        split_given(frames, sampling.frames_per_block, sampling.independent_first_frame)
    except ShapeError:
        return False
    return True


def _codec(sampler: Sampler) -> Codec:
    if sampler.codec is None:
        raise SftkError("nothing says how pictures become latents; name a codec: codec='{use: wan_vae, with: {path: ...}}'")
    return sampler.codec


def _encoded(sampler: Sampler, pictures: Tensor) -> Tensor:
    codec, latents = _codec(sampler), sampler.options.latents
    sized = cover(pictures, latents.height * codec.factor, latents.width * codec.factor)
    return codec.encode(sized)[None]
