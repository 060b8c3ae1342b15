"""Layers of the Wan transformer, under Wan's own parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sftk.functional.apart import attention_apart
from sftk.functional.attention import Backend, Kernel, Mask, attention
from sftk.functional.cache import LayerKV
from sftk.functional.exchange import Exchange, OneRank
from sftk.functional.rooms import CachedKV
from sftk.models.block_ops import BlockOps, gated
from sftk.models.config import WanConfig
from sftk.models.past import cached, joined, written
from sftk.models.precision import upcast
from sftk.models.projections import projections
from sftk.models.rope import rotate


def reset_linear_layers(model: nn.Module) -> None:
    """Draws every linear layer's weight by Xavier's uniform rule, and sets its bias to zero, in place.

    Source: Glorot and Bengio, 2010, eq. 16.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> reset_linear_layers(layer)
        >>> bool(layer.weight.abs().max() <= (6 / 5) ** 0.5), layer.bias.abs().max().item()
        (True, 0.0)
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class RMSNorm(nn.Module):
    """RMS norm over the whole width, before queries and keys are split into heads."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of [..., width] in float32, rounded to x's dtype before the weight multiplies it."""
    y = upcast(x)
    return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention layer: `q`, `k`, `v`, `o`, `norm_q`, `norm_k`."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()

    def queries(self, x: Tensor) -> Tensor:
        """[B, L, H, D]."""
        return self._heads(self.norm_q(self.q(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, H, D] each."""
        k, v = projections(x, self.k, self.v)
        return self._heads(self.norm_k(k)), self._heads(v)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, H, D] each, of one input."""
        q, k, v = projections(x, self.q, self.k, self.v)
        return self._heads(self.norm_q(q)), self._heads(self.norm_k(k)), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    """One transformer block: modulated self-attention, text cross-attention, modulated feed-forward."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rope: tuple[Tensor, Tensor],
        text: Tensor | None,
        text_kv: tuple[Tensor, Tensor] | None,
        past: tuple[CachedKV, ...],
        past_rope: tuple[Tensor, Tensor] | None,
        joint: bool,
        apart: bool,
        mask: Mask,
        backend: Kernel,
        text_backend: Backend,
        keep_kv: bool,
        exchange: Exchange,
        ops: BlockOps,
    ) -> tuple[Tensor, LayerKV | None]:
        """One block; the arguments are those of a `BlockCall`, for one layer.

        The chunks of `past` are joined here, if at all, so that an activation checkpoint remembers the chunks, which blocks
        share, and no copies.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (upcast(self.modulation)[None] + time).unbind(dim=2)
        y, attn = ops.modulate(x, shift1, scale1, self.eps), self.self_attn
        if past_rope is None and type(exchange) is OneRank:
            q, k, v = projections(y, attn.q, attn.k, attn.v)
            q, k = ops.norm_rope(q, k, (attn.norm_q, attn.norm_k), rope)
            v = v.unflatten(-1, (attn.heads, -1))
            stored = k
        else:
            q, k, v = exchange.to_heads(*attn.queries_keys_values(y))
            unrotated = k
            q, k = rotate(q, *rope), rotate(k, *rope)
            stored = k if past_rope is None else unrotated
        if apart:  # before anything is written: a compiled block would copy what it reads of the same memory afterwards
            y = attention_apart(q, k, v, cached(past, k.shape[1] if joint else 0))
            if joint:
                written(past, k, v)
        else:
            k_all, v_all = written(past, k, v) if joint else joined(past, k, v, past_rope)
            y = attention(q, k_all, v_all, mask=mask, backend=backend)
        y = exchange.to_tokens(y)
        x, y = ops.gated_norm(x, attn.o(y.flatten(2)), gate1, self.norm3)

        if text_kv is None:
            assert text is not None
            text_kv = self.cross_attn.keys_values(text)
        queries = self.cross_attn.queries(y)
        found = attention(queries, text_kv[0].to(queries.dtype), text_kv[1].to(queries.dtype), backend=text_backend)
        x, y = ops.added_modulated(x, self.cross_attn.o(found.flatten(2)), shift2, scale2, self.eps)

        x = gated(x, ops.feed_forward(self.ffn, y), gate2)
        return x, ((stored, v, *text_kv) if keep_kv else None)


class Head(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = nn.Linear(config.dim, patch * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor, ops: BlockOps) -> Tensor:
        """[B, L, patch * out_dim] from x [B, L, width] and time [B, F, width]."""
        shift, scale = (upcast(self.modulation)[None] + time[:, :, None]).unbind(dim=2)
        return self.head(ops.modulate(x, shift, scale, self.eps))


class IntervalEmbedding(nn.Sequential):
    """Embeds the interval of an average velocity, to be added to the time's; zero at first, see `reset_parameters`."""

    def __init__(self, config: WanConfig):
        super().__init__(nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))
        self.freq_dim = config.freq_dim

    def reset_parameters(self) -> None:
        """Small normal weights, then zeros, so that a pretrained model starts as it is."""
        first, _, last = self
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        nn.init.normal_(first.weight, std=0.02)
        for zero in (first.bias, last.weight, last.bias):
            nn.init.zeros_(zero)

    def forward(self, interval: Tensor, dtype: torch.dtype) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[..., width] of `dtype` from intervals of any shape, in timesteps."""
        return super().forward(sinusoidal_embedding(interval, self.freq_dim).to(dtype))


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Cosines then sines of `t 10000^(-i / (dim / 2))`, in float64.

    Args:
        timestep: any shape.

    Returns:
        [..., dim] float64.

    Source: DDPM's time embedding, arXiv 2006.11239; order as in Wan 2.1.

    Example:
        >>> sinusoidal_embedding(torch.zeros(1), 4)
        tensor([[1., 1., 0., 0.]], dtype=torch.float64)
    """
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
