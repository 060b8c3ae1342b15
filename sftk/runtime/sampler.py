"""A model with everything that makes videos of it: embedded prompts, a way of sampling, a codec."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sftk.core.geometry import split_blocks
from sftk.core.graph import Graph
from sftk.data.codecs import Codec
from sftk.data.latent_sizes import AXES, say_latents
from sftk.errors import SftkError, ShapeError
from sftk.functional.frame_noise import FrameNoise
from sftk.functional.keys import Key
from sftk.functional.plan import split_given
from sftk.runtime.guidance_batch import free_memory, guidance_fits
from sftk.runtime.prompt_embeds import PromptEmbeds
from sftk.runtime.sample_options import SampleOptions
from sftk.runtime.streaming import VideoStream, stream_latents
from sftk.spec.sampling import CausalOdeSampling, StudentSampling, is_causal, sampler_graph


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Sampler:
    """Makes videos. The backbone is loaded when the first is asked for, after the prompts were embedded.

    Args:
        options: how.
        load: gives the model port.
        embeds: embeds prompts; None when nothing says how.
        codec: decodes latents; None when nothing says how.
        device: where the backbone lives.
        weights: where it came from, for messages.
    """

    options: SampleOptions
    load: Callable[[], Any]
    embeds: PromptEmbeds | None
    codec: Codec | None
    device: torch.device
    weights: Path

    @functools.cached_property
    def port(self) -> Any:
        """The backbone behind the model port."""
        return self.load()

    @property
    def causal(self) -> bool:
        """Whether videos are made block by block."""
        return is_causal(self.options.sampling)

    def prepare(self, prompts: Sequence[str], *, decode: bool = True) -> None:
        """Loads the codec, embeds the prompts and releases the text encoder. `stream` does it for what was not prepared.

        Raises:
            SftkError: nothing says how to embed or to decode, or files are missing or broken.
        """
        if decode:
            if self.codec is None:
                hint = "name a codec: codec='{use: wan_vae, with: {path: ...}}', or `sample.codec` in the recipe"
                raise SftkError(f"nothing says how latents become pictures; {hint}, or write latents only")
            self.codec.prepare()
        if self.embeds is None:
            hint = "name an embedder: text='{use: umt5, with: {path: ...}}', or `sample.text` in the recipe"
            raise SftkError(f"nothing says how prompts are embedded; {hint}")
        self.embeds.prepare([*prompts, self.options.negative])

    def stream(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None = None,
        seeds: int | Sequence[int] = 0,
        initial_latents: Tensor | None = None,
        decode: bool = True,
    ) -> VideoStream:
        """Videos of one batch, block by block, as they are made. Bidirectional models make one block.

        Args:
            prompts: B texts.
            frames: latent frames to make; by default as many as in training.
            seeds: of the noise. One seed stands for itself and those after it, one for each prompt. The same prompt and seed
                give the same video, whatever else is in the batch.
            initial_latents: [B, F0, C, H, W] (or B = 1) frames that the videos begin with.
            decode: yield frames; else latents.

        Returns:
            See `VideoStream`. Nothing runs before the first `next`.

        Raises:
            ShapeError: `frames` are not whole blocks, or the latents have another size.
            SftkError: see `prepare`.

        Example:
            >>> from sftk.runtime.inference import load_sampler
            >>> sampler = load_sampler("recipes/dmd.yaml")
            >>> for frames in sampler.stream(["a 3 moving left"], frames=6, seeds=7):
            ...     print(frames.shape)
            torch.Size([1, 3, 16, 16])
            torch.Size([1, 3, 16, 16])
        """
        latents, frames = self.options.latents, frames or self.options.latents.frames
        seeds = spread_seeds(len(prompts), seeds)
        key = Key(seed=0, phase="sample", samples=seeds)
        given = None if initial_latents is None else self._check_given(initial_latents, len(prompts))
        sampling = self.options.sampling
        if isinstance(sampling, StudentSampling | CausalOdeSampling):
            split_blocks(frames, sampling.frames_per_block, sampling.independent_first_frame and given is None)
            split_given(0 if given is None else given.shape[1], sampling.frames_per_block, sampling.independent_first_frame)
        self.prepare(prompts, decode=decode)
        assert self.embeds is not None
        total = frames + (0 if given is None else given.shape[1])
        noise = FrameNoise(
            key, (latents.channels, latents.height, latents.width), frames if self.causal else total, self.device
        )
        values: dict[str, Any] = {
            "key": key,
            "noise": noise if self.causal else noise.whole(),
            "prompt_embeds": self.embeds(prompts).to(self.device),
            "negative_embeds": self.embeds([self.options.negative] * len(prompts)).to(self.device),
        }
        graph = self._graph(total, len(prompts))
        if given is not None:
            if "initial_latents" not in graph.optional:
                method = sampling.method
                raise SftkError(f"the method {method} takes no given frames; take few_step, causal_ode or bidirectional_ode")
            values["initial_latents"] = given
        blocks = stream_latents(graph, self.port, values, causal=self.causal)
        return VideoStream(blocks, self.codec if decode else None)

    def sample(self, prompts: Sequence[str], *, batch: int = 8, seeds: int | Sequence[int] = 0, **options: Any) -> Tensor:
        """Whole videos for any number of prompts.

        Args:
            prompts: N texts.
            batch: how many are made together.
            seeds, **options: see `stream`.

        Returns:
            [N, F, H, W] (or with a colour axis) in [0, 1], or latents, on the CPU.
        """
        self.prepare(prompts, decode=options.get("decode", True))
        seeds, initial = spread_seeds(len(prompts), seeds), options.pop("initial_latents", None)
        found = []
        for rows in batches(len(prompts), batch):
            given = initial if initial is None or initial.shape[0] == 1 else initial[rows.start : rows.stop]
            stream = self.stream(
                prompts[rows.start : rows.stop], seeds=seeds[rows.start : rows.stop], initial_latents=given, **options
            )
            found.append(torch.cat(list(stream), dim=1))
        return torch.cat(found)

    def _check_given(self, given: Tensor, count: int) -> Tensor:
        latents = self.options.latents
        frame = (latents.channels, latents.height, latents.width)
        if given.dim() != 5 or given.shape[0] not in (1, count) or tuple(given.shape[2:]) != frame:
            wanted = f"[{count}, F, {', '.join(map(str, frame))}]"
            message = f"the given latents have shape {list(given.shape)}, expected {wanted} with {count} or 1 videos"
            sizes = dict(zip(AXES[1:], given.shape[2:], strict=False))
            fix = f"; give others, or {say_latents(sizes)}" if given.dim() == 5 and tuple(sizes.values()) != frame else ""
            raise ShapeError(message + fix)
        return given.to(self.device, torch.float32).expand(count, -1, -1, -1, -1)

    def _graph(self, frames: int, count: int) -> Graph:
        sampling, batched = self.options.sampling, False
        if getattr(sampling, "guidance_batch", None) == "auto" and getattr(sampling, "guidance", 1.0) != 1.0:
            shape = (frames, self.options.latents.channels, self.options.latents.height, self.options.latents.width)
            config = getattr(getattr(self.port, "module", None), "config", None)
            itemsize = 2 if self.options.precision == "bf16" else 4
            batched = config is not None and guidance_fits(
                sampling, config, shape, batch=count, itemsize=itemsize, free=free_memory(self.device)
            )
        return sampler_graph(sampling, guidance_batch=batched)


def spread_seeds(count: int, seeds: int | Sequence[int]) -> tuple[int, ...]:
    """A seed for each of `count` videos: one seed stands for itself and those after it.

    Raises:
        SftkError: another number of them.

    Example:
        >>> spread_seeds(3, 5), spread_seeds(2, [9, 4])
        ((5, 6, 7), (9, 4))
    """
    given = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    if len(given) == 1:
        return tuple(range(given[0], given[0] + count))
    if len(given) != count:
        raise SftkError(f"{len(given)} seeds for {count} videos; give one for each, or the first only")
    return given


def batches(count: int, size: int) -> Iterator[range]:
    """Ranges of at most `size` that cover `count`.

    Example:
        >>> list(batches(5, 2))
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    return (range(start, min(start + size, count)) for start in range(0, count, size))
