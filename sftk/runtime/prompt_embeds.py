"""Prompts embedded before the rollout, so that the text encoder need not stay beside the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sftk.data.embed import true_rows
from sftk.models.text import pad_rows


class PromptEmbeds:
    """Embeds each prompt once, and keeps its rows without padding.

    Args:
        embed: an embedder, or a function of prompts that gives [B, L, D]. Where it has a method `release`, that is called when
            all prompts are embedded.
        batch: prompts that are embedded together.

    Example:
        >>> from sftk.data.embedders import make_embedder
        >>> embeds = PromptEmbeds(make_embedder("digits"))
        >>> embeds.prepare(["a 3 moving left", ""])
        >>> embeds(["a 3 moving left", "a 3 moving left"]).shape
        torch.Size([2, 4, 32])
    """

    def __init__(self, embed: Callable[[Sequence[str]], Tensor], batch: int = 16):
        self._batch = batch
        self._embed: Any = embed
        self._rows: dict[str, Tensor] = {}
        self._tokens = 0

    def prepare(self, prompts: Iterable[str]) -> None:
        """Embeds the prompts that were not embedded before, and releases the encoder.

        Raises:
            SftkError: the encoder is missing or broken, or cannot read a prompt.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for start in range(0, len(missing), self._batch):
            part = missing[start : start + self._batch]
            self._rows |= dict(zip(part, self._embed_rows(part), strict=True))
        release = getattr(self._embed, "release", None)
        if missing and release is not None:
            release()

    def _embed_rows(self, prompts: Sequence[str]) -> list[Tensor]:
        shape = getattr(self._embed, "shape", None)
        if shape is not None:
            self._tokens = shape[0]
            return true_rows(self._embed, prompts)
        whole = self._embed(prompts)
        self._tokens = whole.shape[1]
        return list(whole)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, D] float32 on the CPU, zero after the true lengths."""
        self.prepare(prompts)
        return torch.stack([pad_rows(self._rows[prompt], self._tokens) for prompt in prompts])
