"""A classifier branch: learned registers read a backbone's hidden states and become logits."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftk.errors import ShapeError, SpecError
from sftk.functional.attention import Backend, attention
from sftk.models.config import WanConfig
from sftk.models.layers import reset_linear_layers, sinusoidal_embedding


@attrs.frozen(kw_only=True)
class BranchConfig:
    """Size of a `ClassifierBranch`.

    Args:
        layers: depths of the backbone whose hidden states it reads; negative ones count from the last.
        registers: learned tokens at each depth.
        num_heads: of the cross-attention; null takes the backbone's.
        ffn_dim: width of the feed-forward after it; null is four times the backbone's width.
        hidden_dim: width of the final MLP; null is the backbone's width.
        classes: logits.
        time_embedding: give the final MLP the timestep, too.

    Raises:
        ValueError: a number below 1, or no layer.
    """

    layers: tuple[int, ...]
    registers: int = 1
    num_heads: int | None = None
    ffn_dim: int | None = None
    hidden_dim: int | None = None
    classes: int = 1
    time_embedding: bool = False

    def __attrs_post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a branch reads at least one layer; `layers` is empty")
        for name in ("registers", "num_heads", "ffn_dim", "hidden_dim", "classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")


class Reader(nn.Module):
    """Registers that cross-attend to the hidden states of one depth, then a feed-forward."""

    def __init__(self, width: int, registers: int, heads: int, ffn_dim: int, eps: float):
        super().__init__()
        self.heads = heads
        self.registers = nn.Parameter(torch.randn(1, registers, width) / width**0.5)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.ffn = nn.Sequential(
            nn.LayerNorm(width, eps=eps), nn.Linear(width, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, width)
        )

    def forward(self, hidden: Tensor, backend: Backend) -> Tensor:
        """[B, tokens, width] to [B, registers, width]."""
        hidden = self.norm(hidden)
        queries = self.registers.expand(hidden.shape[0], -1, -1).to(hidden.dtype)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(queries), self.k(hidden), self.v(hidden)))
        x = queries + self.o(attention(q, k, v, backend=backend).flatten(2))
        return x + self.ffn(x)


class ClassifierBranch(nn.Module):
    """Hidden states of a backbone to logits: a `Discriminator` port.

    Args:
        backbone: size of the backbone that it reads.
        config: its own size.
        backend: attention backend, see `sftk.functional.attention`.

    Raises:
        SpecError: a layer that the backbone does not have, or heads that do not divide its width.

    Source: the discriminator of Self-Forcing's GAN variant, arXiv 2506.08009, section 3.3; DMD2, arXiv 2405.14867, section 4.3.

    Example:
        >>> from sftk.models import preset
        >>> branch = ClassifierBranch(preset("digits"), BranchConfig(layers=(1, -1)))
        >>> branch.features_at, branch((torch.zeros(2, 16, 96), torch.zeros(2, 16, 96)), torch.zeros(2, 1)).shape
        ((1, 3), torch.Size([2, 1]))
    """

    def __init__(self, backbone: WanConfig, config: BranchConfig, backend: Backend = "auto"):
        super().__init__()
        width, layers = backbone.dim, backbone.num_layers
        wrong = [index for index in config.layers if not -layers <= index < layers]
        if wrong:
            raise SpecError(f"a branch names the layers {wrong} of a backbone of {layers}; expected {-layers} to {layers - 1}")
        heads = config.num_heads or backbone.num_heads
        if width % heads:
            raise SpecError(f"{heads} heads do not divide the backbone's width {width}")
        self.config, self.backend = config, backend
        self.freq_dim = backbone.freq_dim
        self.features_at = tuple(index % layers for index in config.layers)
        self.readers = nn.ModuleList(
            Reader(width, config.registers, heads, config.ffn_dim or 4 * width, backbone.eps) for _ in self.features_at
        )
        hidden = config.hidden_dim or width
        self.time = nn.Linear(backbone.freq_dim, width) if config.time_embedding else None
        joined = width * (config.registers * len(self.features_at) + int(config.time_embedding))
        self.classifier = nn.Sequential(
            nn.LayerNorm(joined, eps=backbone.eps), nn.Linear(joined, hidden), nn.SiLU(), nn.Linear(hidden, config.classes)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear layers; the last one small, so that training begins near logits of 0."""
        reset_linear_layers(self)
        last = self.classifier[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.02)

    def forward(self, features: tuple[Tensor, ...], timestep: Tensor) -> Tensor:
        """Logits.

        Args:
            features: [B, tokens, width] of each layer in `features_at`.
            timestep: [B] or [B, F], in [0, 1000]; its mean over frames is embedded.

        Returns:
            [B, classes].

        Raises:
            ShapeError: another number of hidden states.
        """
        if len(features) != len(self.readers):
            raise ShapeError(f"the branch reads {len(self.readers)} hidden states, found {len(features)}")
        dtype = next(self.parameters()).dtype
        read = [reader(x.to(dtype), self.backend).flatten(1) for reader, x in zip(self.readers, features, strict=True)]
        if self.time is not None:
            level = timestep if timestep.dim() == 1 else timestep.mean(dim=1)
            read.append(F.silu(self.time(sinusoidal_embedding(level, self.freq_dim).to(dtype))))
        return self.classifier(torch.cat(read, dim=1))
