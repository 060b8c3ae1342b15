"""Sizes of the Wan backbone. The only place where geometry is written out."""

from __future__ import annotations

from typing import Any

import attrs

from sftk.errors import SpecError, did_you_mean


def _positive(instance: Any, attribute: Any, value: int) -> None:
    if value < 1:
        raise ValueError(f"{attribute.name} must be at least 1, found {value}")


@attrs.frozen(kw_only=True)
class WanConfig:
    """Size of a Wan text-to-video transformer, under Wan's own names.

    Args:
        dim: width of the hidden states; num_heads divides it, into heads of an even width.
        ffn_dim: width of the feed-forward layers.
        num_heads, num_layers: of the transformer.
        in_dim, out_dim: channels of the latents.
        freq_dim: width of the sinusoidal time embedding (even).
        text_dim, text_len: width and number of the text embeddings; shorter prompts are padded with zeros.
        patch_size: frames, height, width of a patch; the first is 1.
        qk_norm: RMS norm of queries and keys. cross_attn_norm: affine norm before the cross-attention.
        eps: of the norms.
        interval_embedding: the model takes `interval`, the time that an average velocity spans (MeanFlow); it starts at zero,
            so that a pretrained model starts as it is.
        rope_base: base of the spatial rotary frequencies. rope_base_time: of the temporal ones.

    Raises:
        ValueError: sizes do not fit together.

    Example:
        >>> WanConfig(dim=96, ffn_dim=384, num_heads=3, num_layers=4, in_dim=4, out_dim=4, text_dim=32, text_len=4).head_dim
        32
    """

    dim: int = attrs.field(validator=_positive)
    ffn_dim: int = attrs.field(validator=_positive)
    num_heads: int = attrs.field(validator=_positive)
    num_layers: int = attrs.field(validator=_positive)
    in_dim: int = attrs.field(default=16, validator=_positive)
    out_dim: int = attrs.field(default=16, validator=_positive)
    freq_dim: int = attrs.field(default=256, validator=_positive)
    text_dim: int = attrs.field(default=4096, validator=_positive)
    text_len: int = attrs.field(default=512, validator=_positive)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_base: float = 10000.0
    rope_base_time: float = 10000.0
    interval_embedding: bool = False

    def __attrs_post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} must divide into {self.num_heads} heads of an even width")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, found {self.freq_dim}")
        if self.patch_size[0] != 1:
            raise ValueError(f"the patch must span one frame, found {list(self.patch_size)}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads


PRESETS: dict[str, WanConfig] = {
    "1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
    "digits": WanConfig(
        dim=96,
        ffn_dim=384,
        num_heads=3,
        num_layers=4,
        in_dim=4,
        out_dim=4,
        freq_dim=96,
        text_dim=32,
        text_len=4,
        rope_base=100.0,
        rope_base_time=100.0,
    ),
}
"""Named sizes: `1.3b` and `14b` of Wan 2.1 (arXiv 2503.20314; the config.json of Wan2.1-T2V-1.3B and Wan2.1-T2V-14B), `5b` of
Wan 2.2 (Wan2.2-TI2V-5B, 48 latent channels), and that of the embedded digits task."""

HEAD_DIM = 128
"""Width of a head in every published Wan; checkpoints without a config.json do not tell it."""


def preset(name: str) -> WanConfig:
    """A named size.

    Raises:
        SpecError: there is none of that name.

    Example:
        >>> preset("1.3b").num_layers
        30
    """
    if name not in PRESETS:
        raise SpecError(f"unknown model size {name!r}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]
