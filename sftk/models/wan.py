"""The Wan 2.1 text-to-video transformer: teacher, causal student, cached student and teacher-forced one from one class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftk.errors import ShapeError
from sftk.functional.attention import Backend, attention_mask
from sftk.functional.cache import KVCache, LayerKV, free_space
from sftk.functional.cache_fit import check_cache
from sftk.functional.exchange import Exchange, ExchangeFor, one_rank
from sftk.functional.layout import Layout, check_layout
from sftk.models.block_ops import PLAIN, BlockOps
from sftk.models.config import WanConfig
from sftk.models.layers import Block, Head, IntervalEmbedding, reset_linear_layers, sinusoidal_embedding
from sftk.models.pass_kind import PassKind
from sftk.models.precision import upcast
from sftk.models.rope import rope_table
from sftk.models.trunk import BlockCall, Trunk, run_blocks


class WanModel(nn.Module):
    """The backbone behind the model port (see `sftk.functional.Denoiser`).

    Parameters have Wan's original names, so that original checkpoints load as they are. Whether it is bidirectional,
    block-causal, cached or teacher-forced depends on the arguments of a call alone.

    Args:
        config: its size.
        backend: attention backend, see `sftk.functional.attention`.

    With `fp8_attention` set, self-attention without a mask and without gradient is `sftk.functional.fp8_attention`; with
    `fp8_attention_trains`, too, it is `sftk.functional.fp8_attention_training` in passes with gradient over at least
    `pass_kind.FP8_TRAINING` tokens.

    Source: Wan 2.1, arXiv 2503.20314; per-frame timesteps as in CausVid, arXiv 2412.07772.

    Example:
        >>> from sftk.models import preset
        >>> model = WanModel(preset("digits"))
        >>> flow, kv, _ = model(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 3), torch.zeros(1, 4, 32), cache=KVCache())
        >>> flow.shape, len(kv), kv[0][0].shape
        (torch.Size([1, 3, 4, 8, 8]), 4, torch.Size([1, 48, 3, 32]))
    """

    def __init__(self, config: WanConfig, backend: Backend = "auto"):
        super().__init__()
        self.config = config
        self.backend: Backend = backend
        self.fp8_attention = self.fp8_attention_trains = False
        self.exchange: ExchangeFor = one_rank
        self.trunk: Trunk = run_blocks
        self.ops: BlockOps = PLAIN
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        if config.interval_embedding:
            self.interval_embedding = IntervalEmbedding(config)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, config.dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Wan's initialisation: Xavier for linear layers, small normal for the embeddings, zero for the output."""
        reset_linear_layers(self)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        self.reset_added_parts()
        nn.init.zeros_(self.head.head.weight)

    @property
    def added_parts(self) -> tuple[str, ...]:
        """Submodules that a pretrained checkpoint need not have."""
        return ("interval_embedding",) if self.config.interval_embedding else ()

    def reset_added_parts(self) -> None:
        """Initialises `added_parts` so that they change nothing."""
        for part in self.added_parts:
            self.get_submodule(part).reset_parameters()  # pyright: ignore[reportCallIssue]

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        *,
        cache: KVCache | None = None,
        layout: Layout | None = None,
        positions: Sequence[int] | None = None,
        features_at: Sequence[int] = (),
        interval: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[LayerKV], tuple[Tensor, ...]]:
        """Predicts the flow `noise - x0`.

        Args:
            latents: [B, F, C, H, W].
            timestep: [B] or [B, F], in [0, 1000].
            prompt_embeds: [B, T, text_dim], T at most text_len.
            cache: frames that came before; when given (an empty one, too), keys and values are returned.
            layout: which frames see which; None is all.
            positions: temporal position of each frame; by default 0, 1, 2 ... (after the cached frames, if there are any).
            features_at: layers after which to return the hidden states, in any order; negative ones count from the last.
            interval: [B] or [B, F], timesteps that an average velocity spans, from `timestep` down; None is 0, the flow itself.

        Returns:
            flow: [B, F, C, H, W], in the latents' dtype. kv: see `LayerKV`, for each layer; empty without a cache.
            Without gradient it may lie behind the cache's (`LentKV`), and is copied when it is read.
            features: [B, tokens, width] each.

        Raises:
            ShapeError: an argument does not fit the config, or the cache does not fit the latents.
        """
        frames, height, width = self._check(latents, timestep, prompt_embeds, cache, layout)
        exchange = self.exchange(frames, height * width)
        self._check_cache(cache, latents, height * width, exchange)
        timestep, prompt_embeds = exchange.shared(timestep), exchange.shared(prompt_embeds)
        x = self._embed_patches(exchange.part(self._patches(latents)))
        time = self.time_embedding(sinusoidal_embedding(timestep, self.config.freq_dim).to(self._dtype))
        if interval is not None or self.config.interval_embedding:
            time = time + self._embed_interval(timestep, interval)
        modulation = upcast(self.time_projection(time)).unflatten(-1, (6, -1))
        time = upcast(time)
        if timestep.dim() == 1:
            time, modulation = time[:, None], modulation[:, None]
        text_kv = None if cache is None or torch.is_grad_enabled() else cache.text
        text = self._embed_text(prompt_embeds) if text_kv is None else None

        rope, past_rope = self._rope(latents, cache, positions, frames, height, width)
        mask = attention_mask(layout, height * width, latents.device, self.backend)
        kind = self._kind(latents, height * width, cache, masked=mask is not None)
        kernel = kind.attention(self.backend, fp8=self.fp8_attention, trains=self.fp8_attention_trains)
        space = None
        if cache is not None and past_rope is None and kind.writes:
            space = free_space(cache, frames, batch=latents.shape[0], tokens=height * width, dtype=kind.dtype)
        past = () if cache is None else tuple(cache.parts(i) for i in range(len(self.blocks)))
        call = BlockCall(
            time=modulation,
            rope=rope,
            past_rope=past_rope,
            text=text,
            text_kv=text_kv,
            past=past if space is None else tuple((layer,) for layer in space.layers),
            joint=space is not None,
            apart=past_rope is None and kind.apart(past, kernel),
            mask=mask,
            backend=kernel,
            text_backend=kind.text_attention(self.backend, self.config.text_len),
            keep_kv=cache is not None and space is None,
            exchange=exchange,
            ops=kind.ops(self.ops) if self.config.qk_norm and self.config.cross_attn_norm else PLAIN,
        )
        wanted = tuple(self._layer_index(i) for i in features_at)
        x, kv, hidden = self.trunk(self.blocks, x, call, wanted)
        features = {index: exchange.whole(found) for index, found in hidden.items()}
        if space is not None and text_kv is not None:
            kv = space.lend(text_kv)
        flow = self._unpatch(exchange.whole(self.head(x, time, call.ops)), frames, height, width)
        return flow.to(latents.dtype), kv, tuple(features[index] for index in wanted)

    def _check(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, cache: KVCache | None, layout: Layout | None
    ) -> tuple[int, int, int]:
        config = self.config
        if latents.dim() != 5 or latents.shape[2] != config.in_dim:
            raise ShapeError(
                f"latents must be [B, F, {config.in_dim}, H, W], found {list(latents.shape)}; "
                f"a model of another in_dim, or latents.channels: {config.in_dim} in a recipe, makes them fit"
            )
        batch, frames, _, height, width = latents.shape
        if timestep.shape not in ((batch,), (batch, frames)):
            raise ShapeError(f"timestep must be [{batch}] or [{batch}, {frames}], found {list(timestep.shape)}")
        if prompt_embeds.dim() != 3 or prompt_embeds.shape[0] != batch or prompt_embeds.shape[2] != config.text_dim:
            raise ShapeError(f"prompt_embeds must be [{batch}, T, {config.text_dim}], found {list(prompt_embeds.shape)}")
        if prompt_embeds.shape[1] > config.text_len:
            raise ShapeError(f"prompt_embeds hold {prompt_embeds.shape[1]} tokens, at most {config.text_len} fit")
        if height % config.patch_size[1] or width % config.patch_size[2]:
            raise ShapeError(
                f"a patch of {config.patch_size[1:]} does not divide latents of {height}x{width}; choose multiples of it"
            )
        check_layout(layout, frames)
        if layout is not None and cache is not None and cache.frames:
            raise ShapeError(f"a layout speaks of one pass's own frames; found one with a cache of {cache.frames} frames")
        return frames, height // config.patch_size[1], width // config.patch_size[2]

    def _check_cache(self, cache: KVCache | None, latents: Tensor, tokens: int, exchange: Exchange) -> None:
        if cache is not None:
            check_cache(
                cache,
                batch=latents.shape[0],
                tokens=tokens,
                layers=len(self.blocks),
                heads=self.config.num_heads // exchange.degree,
                text_heads=self.config.num_heads,
                head_dim=self.config.head_dim,
            )

    def _kind(self, latents: Tensor, tokens: int, cache: KVCache | None, *, masked: bool) -> PassKind:
        """What is known of a pass whose frames have so many tokens."""
        cached = 0 if cache is None else cache.frames * tokens
        dtype = self._product_dtype(latents.device)
        return PassKind(device=latents.device, dtype=dtype, tokens=latents.shape[1] * tokens, cached=cached, masked=masked)

    @property
    def _dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def _product_dtype(self, device: torch.device) -> torch.dtype:
        """Of linear layers' outputs, and so of keys and values."""
        if device.type == "meta":  # which has no autocast; what stands for it there (in `sftk plan`) changes linear layers
            nothing = torch.empty(0, 0, dtype=self._dtype, device=device)
            return F.linear(nothing, nothing).dtype
        cast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if cast else self._dtype

    def _patches(self, latents: Tensor) -> Tensor:
        _, ph, pw = self.config.patch_size
        patches = latents.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # B F C h ph w pw
        return patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)

    def _embed_patches(self, patches: Tensor) -> Tensor:
        weight = self.patch_embedding.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def _embed_text(self, prompt_embeds: Tensor) -> Tensor:
        missing = self.config.text_len - prompt_embeds.shape[1]
        padded = F.pad(prompt_embeds, (0, 0, 0, missing)) if missing else prompt_embeds
        return self.text_embedding(padded.to(self._dtype))

    def _embed_interval(self, timestep: Tensor, interval: Tensor | None) -> Tensor:
        if not self.config.interval_embedding:
            raise ShapeError("this model takes no interval; set interval_embedding: true in its size")
        interval = torch.zeros_like(timestep) if interval is None else interval
        if interval.shape != timestep.shape:
            raise ShapeError(f"interval must be of the timestep's shape {list(timestep.shape)}, found {list(interval.shape)}")
        return self.interval_embedding(interval, self._dtype)

    def _unpatch(self, x: Tensor, frames: int, height: int, width: int) -> Tensor:
        _, ph, pw = self.config.patch_size
        patches = x.unflatten(2, (ph, pw, -1)).unflatten(1, (frames, height, width))  # B F h w ph pw C
        return patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _rope(
        self, latents: Tensor, cache: KVCache | None, positions: Sequence[int] | None, frames: int, height: int, width: int
    ):
        config = self.config
        dtype = torch.promote_types(latents.dtype, torch.float32)
        past = 0 if cache is None else cache.frames

        def table(places: Sequence[int]):
            return rope_table(
                tuple(places), height, width, config.head_dim, config.rope_base_time, config.rope_base, latents.device, dtype
            )

        if cache is not None and cache.rope == "relative":
            return table(range(past, past + frames)), table(range(past)) if past else table((0,))
        if positions is None:
            start = cache.positions[-1] + 1 if cache is not None and past else 0
            positions = range(start, start + frames)
        if len(positions) != frames:
            raise ShapeError(f"{len(positions)} positions for {frames} frames")
        return table(positions), None

    def _layer_index(self, index: int) -> int:
        if not -len(self.blocks) <= index < len(self.blocks):
            raise ShapeError(f"features_at names layer {index} of {len(self.blocks)}")
        return index % len(self.blocks)
