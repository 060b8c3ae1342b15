"""Wan's VAE as a codec and its text encoder as an embedder. They load when they are used, so that a check needs no weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs
import torch
from torch import Tensor

from sftk.data.choices import FilePath
from sftk.errors import DataError, ShapeError
from sftk.models.text import TextEncoder, load_text_encoder
from sftk.models.vae import DecodeState, WanVae, decode, decode_block, encode, load_vae
from sftk.models.vae_tiles import Tiles

Made = TypeVar("Made")
DType = Literal["fp32", "bf16", "fp16"]
VAE_WEIGHTS = {16: 126_892_531, 48: 704_688_668}
"""Weights of the VAEs of Wan 2.1 and of Wan 2.2's 5B, by their latent channels."""
TEXT_WEIGHTS = 5_680_910_336
"""Weights of the encoder of UMT5-XXL."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOADED: dict[Any, Any] = {}
"""What this process has loaded, by what it was loaded from: options that say the same share one copy."""


@attrs.frozen(kw_only=True)
class WanVaeCodec:
    """Wan's VAE, see `sftk.models.vae`.

    Args:
        path: of the weights, see `load_vae`.
        device: `auto` is CUDA where there is one.
        dtype: to compute in; Wan computes in float32.
        tile: side of a tile in pixels, for cards that do not hold a whole picture's activations; 0 is none.
        stride: between tiles; 0 is three quarters of one.
        slicing: the videos of a batch one after the other.
        chunk: latent frames that are decoded together; more is faster and takes more memory.
        channels, factor, temporal_factor: of the VAE. The defaults are Wan 2.1's; for Wan 2.2's 5B they are 48, 16 and 4.

    Raises:
        ValueError: the tiles do not fit together.
        DataError: when it is first used and is of other sizes.

    Example:
        >>> codec = WanVaeCodec(path="wan_models/Wan2.1-T2V-1.3B")
        >>> codec.channels, codec.factor, codec.pixel_frames(21)
        (16, 8, 81)
    """

    path: FilePath
    device: str = "auto"
    dtype: DType = "fp32"
    tile: int = 0
    stride: int = 0
    slicing: bool = False
    chunk: int = 1
    channels: int = 16
    factor: int = 8
    temporal_factor: int = 4

    def __attrs_post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, found {self.chunk}")
        self.tiles()

    def tiles(self) -> Tiles:
        """The tiles that the options speak of."""
        return Tiles(size=self.tile, stride=self.stride or self.tile * 3 // 4)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pictures that so many latent frames stand for: one for the first, `temporal_factor` for each other."""
        return 1 + self.temporal_factor * (latent_frames - 1)

    @property
    def vae(self) -> WanVae:
        """The VAE, loaded when it is first asked for.

        Raises:
            CheckpointError: its files are missing or broken.
            DataError: it is of other sizes than the options say.
        """
        return self._sized(_load_once(attrs.evolve(self, chunk=1), lambda: self._load(pick_device(self.device))))

    def _sized(self, vae: WanVae) -> WanVae:
        found = (vae.channels, vae.factor, vae.temporal_factor)
        if found != (self.channels, self.factor, self.temporal_factor):
            names = ("channels", "factor", "temporal_factor")
            sizes = ", ".join(f"{name}: {size}" for name, size in zip(names, found, strict=True))
            raise DataError(f"the VAE at {self.path} is of other sizes than the codec's options; set {sizes}")
        return vae

    def _load(self, device: torch.device) -> WanVae:
        dtype = _DTYPES[self.dtype]
        return load_vae(Path(self.path), device=device, dtype=dtype, tiles=self.tiles(), slicing=self.slicing)

    def inspect(self) -> int:
        """How many weights it has, from the names and shapes in its files, which are checked; no value is read.

        Raises:
            CheckpointError, DataError: see `vae`.
        """
        return _count(self._sized(self._load(torch.device("meta"))).module)

    @property
    def published(self) -> int:
        """How many weights Wan's VAE with as many latent channels has."""
        return VAE_WEIGHTS.get(self.channels, VAE_WEIGHTS[16])

    @property
    def bytes_each(self) -> int:
        """Of a weight in memory."""
        return _DTYPES[self.dtype].itemsize

    @property
    def on_device(self) -> bool:
        """Whether it lies on the GPU where there is one."""
        return self.device != "cpu"

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [F', C, H / factor, W / factor] of a video [F, 3, H, W] in [0, 1].

        Raises:
            ShapeError: see `sftk.models.vae.encode`.
        """
        if video.dim() != 4:
            raise ShapeError(f"video has shape {list(video.shape)}; expected [F, 3, H, W]")
        return encode(self.vae, video[None])[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Videos [B, F, 3, H, W] in [0, 1] of normalised latents [B, F', C, h, w].

        Raises:
            ShapeError: see `sftk.models.vae.decode`.
        """
        return decode(self.vae, latents, chunk=self.chunk)

    @torch.no_grad()
    def decode_block(self, latents: Tensor, state: DecodeState | None) -> tuple[Tensor, DecodeState]:
        """The next frames of videos, and the state for those after them.

        Raises:
            ShapeError: see `sftk.models.vae.decode_block`.
        """
        return decode_block(self.vae, latents, state, chunk=self.chunk)

    def prepare(self) -> None:
        """Loads the VAE.

        Raises:
            CheckpointError, DataError: see `vae`.
        """
        _ = self.vae


@attrs.frozen(kw_only=True)
class Umt5Embedder:
    """Wan's text encoder, see `sftk.models.text`. It takes 11 GB; to train, embed the prompts before (`sftk data embed`).

    Args:
        path: of the weights, see `load_text_encoder`.
        tokenizer: its folder, where it does not lie beside the weights.
        device: `auto` is CUDA where there is one.
        dtype: to compute in.
        offload: keep the weights on the host, and copy them to the device while it embeds.
        text_len: rows of an embedding; longer prompts are cut.
        text_dim: width of a row.

    Raises:
        DataError: when it is first used and has another width.

    Example:
        >>> Umt5Embedder(path="wan_models/Wan2.1-T2V-1.3B").shape
        (512, 4096)
    """

    path: FilePath
    tokenizer: FilePath | None = None
    device: str = "auto"
    dtype: DType = "bf16"
    offload: bool = False
    text_len: int = 512
    text_dim: int = 4096

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a prompt and their width."""
        return self.text_len, self.text_dim

    @property
    def encoder(self) -> TextEncoder:
        """The encoder, loaded when it is first asked for.

        Raises:
            CheckpointError: its files are missing or broken.
            DataError: it has another width than the options say.
        """
        return self._sized(_load_once(self, lambda: self._load(pick_device(self.device), self.offload)))

    def _sized(self, encoder: TextEncoder) -> TextEncoder:
        if encoder.width != self.text_dim:
            raise DataError(f"the text encoder at {self.path} has rows of {encoder.width}; set text_dim: {encoder.width}")
        return encoder

    def _load(self, device: torch.device, offload: bool) -> TextEncoder:
        return load_text_encoder(
            Path(self.path),
            tokenizer=None if self.tokenizer is None else Path(self.tokenizer),
            tokens=self.text_len,
            device=device,
            dtype=_DTYPES[self.dtype],
            offload=offload,
        )

    def inspect(self) -> int:
        """How many weights it has, from the names and shapes in its files, which are checked, as the tokenizer is; the files
        are mapped, and no value is read.

        Raises:
            CheckpointError, DataError: see `encoder`.
        """
        return _count(self._sized(self._load(torch.device("cpu"), True)).module)

    @property
    def published(self) -> int:
        """How many weights the encoder of UMT5-XXL has."""
        return TEXT_WEIGHTS

    @property
    def bytes_each(self) -> int:
        """Of a weight in memory."""
        return _DTYPES[self.dtype].itemsize

    @property
    def on_device(self) -> bool:
        """Whether it lies on the GPU where there is one."""
        return self.device != "cpu" and not self.offload

    def rows(self, prompts: Sequence[str]) -> list[Tensor]:
        """[n, text_dim] of each prompt, at its true length."""
        return self.encoder.rows(prompts)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_len, text_dim] float32, zero after the true lengths."""
        return self.encoder(prompts)

    def release(self) -> None:
        """Frees the encoder's memory; it is loaded again when it is used again. With `offload` it stays on the host."""
        if not self.offload:
            _LOADED.pop(self, None)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def pick_device(name: str) -> torch.device:
    """The device of an option; `auto` is CUDA where there is one.

    Raises:
        DataError: PyTorch does not know it, or has none.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device: {name} asks for CUDA, and PyTorch finds none; use auto or cpu")
    return device


def _load_once(key: Any, load: Callable[[], Made]) -> Made:
    if key not in _LOADED:
        _LOADED[key] = load()
    return _LOADED[key]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
