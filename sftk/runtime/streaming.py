"""Videos as they are made: blocks of latents from a graph, decoded one by one with the codec's caches carried along."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sftk.core.graph import Graph
from sftk.data.codecs import Codec

BLOCKS = "x0_blocks"
"""The key that a causal sampler's fold collects."""


@torch.no_grad()
def stream_latents(graph: Graph, denoiser: Any, values: Mapping[str, Any], *, causal: bool) -> Iterator[tuple[Tensor, bool]]:
    """The latents of a sampler, block by block.

    Args:
        graph: from `sampler_graph`.
        denoiser: the model port.
        values: the graph's inputs.
        causal: the graph makes blocks; else it makes all frames at once.

    Yields:
        [B, n, C, H, W], and whether the model made them: frames that are given come first.
    """
    values = {name: value for name, value in values.items() if name in (*graph.inputs, *graph.optional)}
    if not causal:
        yield graph.run(values, {"denoiser": denoiser})["x0"], True
        return
    if "initial_latents" in values:
        yield values["initial_latents"], False
    for latents in graph.stream(values, {"denoiser": denoiser}, BLOCKS):
        yield latents, True


class VideoStream:
    """Iterates over a video's frames as they are made: [B, m, H, W] or [B, m, 3, H, W] in [0, 1], float32 on the CPU.

    Between two blocks nothing runs. Stop iterating, and `close`, to end it early. With a window its memory does not grow with
    the number of frames.

    Args:
        blocks: latents, and whether a model made them, see `stream_latents`.
        codec: decodes them; None yields the latents themselves.

    Attributes:
        latents: [B, n, C, h, w] of the frames that came last, where they were made.
        frames: pictures (or latent frames, without a codec) of each video so far.
        seconds: spent in it so far; what its consumer does between two blocks does not count.
        latency: those of them that it took to the first frames that the model made; None before them.

    Example:
        >>> from sftk.data.codecs import digits_codec
        >>> stream = VideoStream(iter([(torch.zeros(1, 3, 4, 8, 8), True)] * 2), digits_codec())
        >>> [frames.shape for frames in stream], stream.frames, 0 < stream.latency <= stream.seconds
        ([torch.Size([1, 3, 16, 16]), torch.Size([1, 3, 16, 16])], 6, True)
    """

    def __init__(self, blocks: Iterator[tuple[Tensor, bool]], codec: Codec | None):
        self._blocks, self._codec = blocks, codec
        self._state: Any = None
        self.latents: Tensor | None = None
        self.frames = 0
        self.seconds = 0.0
        self.latency: float | None = None

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> Tensor:
        began = time.perf_counter()
        try:
            self.latents, made = next(self._blocks)
        except BaseException:  # its end, an error or an interruption
            self._state = None
            raise
        frames = self.latents
        if self._codec is not None:
            frames, self._state = self._codec.decode_block(frames, self._state)
        frames = frames.to("cpu", torch.float32)
        self.frames += frames.shape[1]
        self.seconds += time.perf_counter() - began
        if made and self.latency is None:
            self.latency = self.seconds
        return frames

    def close(self) -> None:
        """Ends it, and frees the caches."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()
        self._blocks, self._state = iter(()), None
