"""The shapes at which a model calls attention."""

from __future__ import annotations

import attrs
import torch

from sftk.core.geometry import split_blocks
from sftk.functional.layout import Layout
from sftk.models.config import WanConfig
from sftk.runtime.attention_choice import LAYOUT
from sftk.runtime.device import Precision
from sftk.spec.schema import LatentsSection


@attrs.frozen(kw_only=True)
class Shape:
    """A shape at which a model calls attention.

    Args:
        name: `full`, `cached <blocks of context>`, `block_causal`, `cross` or `cross block`.
        queries, keys: tokens. layout: who sees whom, or None for all. tokens_per_frame: of the layout's frames.
    """

    name: str
    queries: int
    keys: int
    layout: Layout | None = None
    tokens_per_frame: int = 1

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that see each other."""
        if self.layout is None:
            return self.queries * self.keys
        return int(self.layout.frame_mask().sum()) * self.tokens_per_frame**2

    def shrunk(self, most: int) -> Shape:
        """The same with at most so many queries and keys; of a layout, with fewer tokens in a frame.

        Example:
            >>> Shape(name="cross", queries=9, keys=5).shrunk(6).queries
            6
        """
        if self.layout is None:
            return attrs.evolve(self, queries=min(self.queries, most), keys=min(self.keys, most))
        tokens = max(1, min(self.tokens_per_frame, most // self.layout.frames))
        count = tokens * self.layout.frames
        return attrs.evolve(self, queries=count, keys=count, tokens_per_frame=tokens)


@attrs.frozen(kw_only=True)
class Heads:
    """What all shapes of a model share."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype


def model_shapes(
    config: WanConfig, latents: LatentsSection, *, batch: int, precision: Precision, frames_per_block: int = 3
) -> tuple[Heads, tuple[Shape, ...]]:
    """The shapes of a model's attention: one pass over all frames, blocks after any context, block-causal, and the text from
    all frames and from a block.

    Example:
        >>> from sftk.models import preset
        >>> latents = LatentsSection(frames=6, channels=4, height=8, width=8)
        >>> heads, shapes = model_shapes(preset("digits"), latents, batch=1, precision="bf16")
        >>> [(shape.name, shape.queries, shape.keys) for shape in shapes][:3]
        [('full', 96, 96), ('cached 0', 48, 48), ('cached 1', 48, 96)]
    """
    _, rows, columns = config.patch_size
    tokens, frames = latents.height // rows * (latents.width // columns), latents.frames
    blocks = split_blocks(frames, frames_per_block, False)
    layout = Layout(kind="block_causal", blocks=blocks)
    cached = [
        Shape(name=f"cached {index}", queries=length * tokens, keys=sum(blocks[: index + 1]) * tokens)
        for index, length in enumerate(blocks)
    ]
    everything = frames * tokens
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    heads = Heads(batch=batch, heads=config.num_heads, head_dim=config.head_dim, dtype=dtype)
    return heads, (
        Shape(name="full", queries=everything, keys=everything),
        *cached,
        Shape(name=LAYOUT, queries=everything, keys=everything, layout=layout, tokens_per_frame=tokens),
        Shape(name="cross", queries=everything, keys=config.text_len),
        Shape(name="cross block", queries=blocks[-1] * tokens, keys=config.text_len),
    )
