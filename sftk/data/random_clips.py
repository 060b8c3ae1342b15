"""Random latents and prompt embeddings of any size, for benchmarks and dry runs."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from sftk.errors import DataError


@attrs.frozen
class RandomClips:
    """A map-style data set of standard normal latents and embeddings. Sample i is a function of (seed, i) alone.

    Args:
        frames: latent frames. channels, height, width: of the latents.
        seed: any integer.
        size: how many samples there are.
        text_len, text_dim: number and width of the prompt embeddings.
        ode_states: states of `ode_latents`, a trajectory that has no meaning; 0 gives none.
        initial_frames: frames of `initial_latents`, as in image to video; 0 gives none.

    Raises:
        DataError: a size is below 1.

    Example:
        >>> clip = RandomClips(frames=3, channels=16, height=8, width=12, text_len=16, text_dim=32)[5]
        >>> clip["latents"].shape, clip["prompt_embeds"].shape
        (torch.Size([3, 16, 8, 12]), torch.Size([16, 32]))
    """

    frames: int = 21
    seed: int = 0
    size: int = 1024
    channels: int = 16
    height: int = 60
    width: int = 104
    text_len: int = 512
    text_dim: int = 4096
    ode_states: int = 0
    initial_frames: int = 0

    def __attrs_post_init__(self) -> None:
        if min(self.frames, self.size, self.channels, self.height, self.width, self.text_len, self.text_dim) < 1:
            raise DataError(f"every size of random clips must be at least 1, found {self}")
        if min(self.ode_states, self.initial_frames) < 0:
            raise DataError(f"ode_states and initial_frames of random clips must be at least 0, found {self}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
        space = (self.channels, self.height, self.width)
        sample = {
            "latents": torch.randn(self.frames, *space, generator=generator),
            "prompt_embeds": torch.randn(self.text_len, self.text_dim, generator=generator),
            "negative_embeds": torch.zeros(self.text_len, self.text_dim),
        }
        if self.ode_states:
            sample["ode_latents"] = torch.randn(self.ode_states, self.frames, *space, generator=generator)
        if self.initial_frames:
            sample["initial_latents"] = torch.randn(self.initial_frames, *space, generator=generator)
        return sample
