"""Named text embedders: what a data set's `text` option may say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
from torch import Tensor

from sftk.core.plugins import extensible
from sftk.data.choices import Choice, make_choice
from sftk.data.digits_prompts import PROMPT_SHAPE, embed_prompts
from sftk.data.embeddings import StoredEmbedder
from sftk.data.wan import Umt5Embedder


class Embedder(Protocol):
    """Turns prompts into embeddings.

    `shape`: tokens of a prompt and their width. Calling it with B prompts gives [B, *shape] float32.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def __call__(self, prompts: Sequence[str]) -> Tensor: ...


@attrs.frozen
class DigitsEmbedder:
    """The embedded task's table, see `sftk.data.digits_prompts`.

    Raises:
        DataError: when called with a prompt that it cannot read.

    Example:
        >>> DigitsEmbedder()(["a 3 moving left"]).shape
        torch.Size([1, 4, 32])
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a prompt and their width."""
        return PROMPT_SHAPE[0], PROMPT_SHAPE[1]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return embed_prompts(prompts)


EMBEDDERS: dict[str, Callable[..., Embedder]] = {
    "digits": DigitsEmbedder,
    "umt5": Umt5Embedder,
    "stored": StoredEmbedder,
}
"""Makers of embedders by name, called with the options of `{use: ..., with: ...}`; a plugin may add its own."""
extensible(EMBEDDERS)


def make_embedder(text: Choice) -> Embedder:
    """The embedder that a `text` option names.

    Raises:
        DataError: it is unknown, or its options are wrong.

    Example:
        >>> make_embedder("digits").shape
        (4, 32)
        >>> make_embedder("digitz")
        Traceback (most recent call last):
        sftk.errors.DataError: unknown text embedder 'digitz'; did you mean 'digits'?
    """
    return make_choice("text embedder", EMBEDDERS, text)


def text_shapes(text: Choice) -> dict[str, tuple[int, ...]]:
    """Shapes of the keys that an embedder adds to a sample.

    Example:
        >>> text_shapes("digits")
        {'prompt_embeds': (4, 32), 'negative_embeds': (4, 32)}
    """
    shape = tuple(make_embedder(text).shape)
    return {"prompt_embeds": shape, "negative_embeds": shape}
