"""Wan's VAE through diffusers: videos to latents, latents to videos, at once or block by block.

Latents here are normalised, as the backbone sees them: `(latents - mean) / std` for each channel. Time is causal: the first
latent frame is one picture, each later one `temporal_factor` pictures, and a block needs of the past only what the convolutions
cached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from sftk.core.extras import import_extra
from sftk.errors import CheckpointError, ShapeError
from sftk.models.config_files import CLASSES as BACKBONES
from sftk.models.mapped import assign_weights, map_file, map_folder
from sftk.models.vae_keys import to_diffusers, vae_config
from sftk.models.vae_tiles import WHOLE, Tiles, join_tiles, split_tiles
from sftk.models.weight_folders import holds_config, read_json, shown_contents

WAN_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
TEMPORAL_FACTOR = 4
"""Pictures of a latent frame after the first, in both published VAEs; a loaded one says it itself."""
Caches = tuple[Any, ...]
"""What the decoder's causal convolutions keep of one tile: tensors, or a mark of a convolution that has not begun."""


@attrs.frozen(eq=False)
class WanVae:
    """A VAE and the statistics of its latents.

    Args:
        module: diffusers' `AutoencoderKLWan`, frozen.
        tiles: the pieces in which pictures are encoded and decoded; WHOLE does it at once.
        slicing: encode and decode the videos of a batch one after the other.

    Example:
        >>> from diffusers import AutoencoderKLWan
        >>> vae = WanVae(AutoencoderKLWan(base_dim=8))
        >>> vae.channels, vae.factor, vae.temporal_factor, vae.pixel_frames(21)
        (16, 8, 4, 81)
    """

    module: Any
    tiles: Tiles = WHOLE
    slicing: bool = False

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.module.config.z_dim

    @property
    def factor(self) -> int:
        """Pixels of a latent's row or column."""
        return self.module.config.scale_factor_spatial

    @property
    def temporal_factor(self) -> int:
        """Pictures of a latent frame, the first excepted."""
        return self.module.config.scale_factor_temporal

    @property
    def patch(self) -> int:
        """Pixels of a row or column that the outer convolutions take as channels."""
        return self.module.config.patch_size or 1

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.module.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.module.post_quant_conv.weight.device

    def pixel_frames(self, latent_frames: int) -> int:
        """Pictures that so many latent frames stand for, from the start of a video."""
        return 1 + self.temporal_factor * (latent_frames - 1)

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, [C, 1, 1], on the device of `like`."""
        config = self.module.config
        mean, std = (torch.tensor(values, device=like.device) for values in (config.latents_mean, config.latents_std))
        return mean[:, None, None], std[:, None, None]


@attrs.frozen(eq=False)
class DecodeState:
    """Where a streaming decode stands: a value, so that a stream may be forked or decoded again from any block.

    Args:
        caches: of every tile.
        frames: latent frames decoded so far.
    """

    caches: tuple[Caches, ...]
    frames: int


def load_vae(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiles: Tiles = WHOLE,
    slicing: bool = False,
) -> WanVae:
    """Wan's VAE from any of the places where it is published.

    Args:
        path: a diffusers folder (of the VAE, or of a pipeline with `vae/` in it), Wan's `.pth` file, or a folder with it.
        dtype: to compute in. Wan computes in float32.

    Raises:
        CheckpointError: there is no VAE, or it is broken or another one.
        SftkError: diffusers is not installed.
    """
    library = import_extra("diffusers", "the VAE")
    place = find_vae(Path(path))
    if place.is_file():
        weights = map_file(place)
        config = vae_config(weights, place)
        weights = to_diffusers(weights, config)
    else:
        config = read_json(place / "config.json")
        name = config.get("_class_name", "AutoencoderKLWan")
        if name != "AutoencoderKLWan":
            raise CheckpointError(f"{place / 'config.json'} is of the class {name}; expected AutoencoderKLWan")
        weights = map_folder(place, "diffusion_pytorch_model")
    with torch.device("meta"):
        module: nn.Module = library.AutoencoderKLWan.from_config(config)
    assign_weights(module, {name: tensor.to(device, dtype) for name, tensor in weights.items()}, place)
    return WanVae(module.requires_grad_(False).eval(), tiles, slicing)


def find_vae(path: Path) -> Path:
    """The folder or file that holds a VAE.

    Raises:
        CheckpointError: there is none; the message lists what was looked for.
    """
    if path.is_file():
        return path
    candidates = (path / "vae", *(path / name for name in WAN_FILES), path)
    for place in candidates:
        if place.is_file() or holds_config(place, BACKBONES):
            return place
    found = f"holds only {shown_contents(path)}" if path.is_dir() else "is no folder"
    raise CheckpointError(
        f"no VAE at {path}, which {found}; expected config.json with diffusion_pytorch_model.safetensors, "
        f"such a folder named vae/, or {' or '.join(WAN_FILES)}"
    )


def encode(vae: WanVae, video: Tensor) -> Tensor:
    """Normalised latents of videos: the mode of the posterior, as Wan takes it.

    Args:
        video: [B, F, 3, H, W] in [0, 1]. One picture is a start for image to video; else F is 1 plus a multiple of the temporal
            factor.

    Returns:
        [B, F', C, H / factor, W / factor] float32 on the video's device.

    Raises:
        ShapeError: other axes, a factor that does not divide a side, or a number of pictures that ends within a latent frame.

    Example:
        >>> from diffusers import AutoencoderKLWan
        >>> encode(WanVae(AutoencoderKLWan(base_dim=8)), torch.rand(1, 5, 3, 16, 24)).shape
        torch.Size([1, 2, 16, 2, 3])
    """
    shape = list(video.shape)
    if video.dim() != 5 or shape[2] != 3 or shape[3] % vae.factor or shape[4] % vae.factor:
        raise ShapeError(f"video has shape {shape}; expected [B, F, 3, H, W] with sides that {vae.factor} divides")
    if (shape[1] - 1) % vae.temporal_factor:
        raise ShapeError(f"video has {shape[1]} pictures; expected 1 plus a multiple of {vae.temporal_factor}")
    if vae.tiles.size:
        sizes = (vae.tiles.size, vae.tiles.size, vae.tiles.stride, vae.tiles.stride)
        vae.module.enable_tiling(*sizes)
    pixels = (video * 2 - 1).transpose(1, 2).to(vae.device, vae.dtype)
    parts = pixels.split(1) if vae.slicing else (pixels,)
    latents = torch.cat([vae.module.encode(part).latent_dist.mode() for part in parts])
    latents = latents.to(video.device, torch.float32).transpose(1, 2)
    mean, std = vae.statistics(latents)
    return (latents - mean) / std


def decode(vae: WanVae, latents: Tensor, *, chunk: int = 1) -> Tensor:
    """Videos of normalised latents, all frames at once.

    Args:
        latents: [B, F', C, h, w].
        chunk: latent frames that go through the decoder together; more is faster and takes more memory.

    Returns:
        [B, F, 3, H, W] float32 in [0, 1], with F = 1 + temporal factor x (F' - 1).

    Raises:
        ShapeError: not five axes, or another number of channels.

    Example:
        >>> from diffusers import AutoencoderKLWan
        >>> decode(WanVae(AutoencoderKLWan(base_dim=8)), torch.zeros(1, 2, 16, 2, 3)).shape
        torch.Size([1, 5, 3, 16, 24])
    """
    parts = latents.split(1) if vae.slicing else (latents,)
    return torch.cat([decode_block(vae, part, None, chunk=chunk)[0] for part in parts])


def decode_block(
    vae: WanVae, latents: Tensor, state: DecodeState | None = None, *, chunk: int = 1
) -> tuple[Tensor, DecodeState]:
    """Decodes the next block of a video. Blocks of any lengths give the frames that the whole decode gives.

    Args:
        latents: [B, n, C, h, w], the block's normalised latents; n is at least 1, and B, h, w are those of the first block.
        state: what the block before returned; None at the start of a video.
        chunk: latent frames that go through the decoder together.

    Returns:
        frames [B, m, 3, H, W] float32 in [0, 1], m pictures: one for the video's first latent frame, `temporal_factor` for each
        other; and the state for the next block. The given state is unchanged.

    Raises:
        ShapeError: not five axes, no frame, another number of channels, or another size than the state's.

    Example:
        >>> from diffusers import AutoencoderKLWan
        >>> vae = WanVae(AutoencoderKLWan(base_dim=8))
        >>> frames, state = decode_block(vae, torch.zeros(1, 1, 16, 2, 3))
        >>> frames.shape, decode_block(vae, torch.zeros(1, 3, 16, 2, 3), state)[0].shape
        (torch.Size([1, 1, 3, 16, 24]), torch.Size([1, 12, 3, 16, 24]))
    """
    if latents.dim() != 5 or latents.shape[2] != vae.channels or latents.shape[1] < 1:
        raise ShapeError(f"latents have shape {list(latents.shape)}; expected [B, F, {vae.channels}, h, w] with a frame")
    mean, std = vae.statistics(latents)
    scaled = (latents * std + mean).transpose(1, 2).to(vae.device, vae.dtype)
    rows = split_tiles(scaled, vae.tiles, vae.factor)
    count = sum(len(row) for row in rows)
    if state is None:
        layers = sum(isinstance(module, nn.Conv3d) for module in vae.module.decoder.modules())
        state = DecodeState(((None,) * layers,) * count, 0)
    if len(state.caches) != count:
        raise ShapeError(f"latents of {list(latents.shape)} make {count} tiles, the state has {len(state.caches)}")
    old, new = iter(state.caches), []
    pictures: list[list[Tensor]] = []
    for row in rows:
        decoded = [_decode_tile(vae, tile, next(old), first=state.frames == 0, chunk=chunk) for tile in row]
        pictures.append([picture for picture, _ in decoded])
        new.extend(caches for _, caches in decoded)
    # Seams are blended before patches become pixels, as diffusers does.
    joined = join_tiles(pictures, vae.tiles, vae.patch, scaled.shape[-2:], vae.factor)
    frames = _unpatch(joined, vae.patch).transpose(1, 2).to(latents.device, torch.float32)
    return (frames.clamp(-1, 1) + 1) / 2, DecodeState(tuple(new), state.frames + latents.shape[1])


def _decode_tile(vae: WanVae, tile: Tensor, caches: Caches, *, first: bool, chunk: int) -> tuple[Tensor, Caches]:
    """Decoder outputs [B, 3 patch^2, F, H, W] of one tile [B, C, F', h, w], and its caches."""
    carried = list(caches)  # the decoder replaces entries, and leaves the tensors in them as they are
    _check_size(tile, carried)
    # The first frame makes one picture instead of several, so that it goes alone.
    parts = [tile[:, :, :1], *tile[:, :, 1:].split(chunk, dim=2)] if first else list(tile.split(chunk, dim=2))
    pictures = []
    for index, part in enumerate(part for part in parts if part.shape[2]):
        # Contiguous, so that the same kernels run however the video is cut into blocks.
        hidden = vae.module.post_quant_conv(part.contiguous())
        pictures.append(vae.module.decoder(hidden, feat_cache=carried, feat_idx=[0], first_chunk=first and index == 0))
    return torch.cat(pictures, dim=2), tuple(carried)


def _check_size(tile: Tensor, carried: list[Any]) -> None:
    cached = carried[0]
    if isinstance(cached, Tensor) and (cached.shape[0], *cached.shape[3:]) != (tile.shape[0], *tile.shape[3:]):
        found, wanted = [tile.shape[0], *tile.shape[3:]], [cached.shape[0], *cached.shape[3:]]
        raise ShapeError(f"this block has batch, height and width {found}, the blocks before had {wanted}")


def _unpatch(outputs: Tensor, patch: int) -> Tensor:
    """[B, 3 p p, F, H, W] to [B, 3, F, H p, W p]; of the channels' two patch axes the first is the column."""
    if patch == 1:
        return outputs
    parts = outputs.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2)
    return parts.flatten(5, 6).flatten(3, 4)
