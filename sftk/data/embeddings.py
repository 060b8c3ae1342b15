"""Prompt embeddings in an LMDB environment: computed once, read by every training process.

`embedding_<hash>` holds the rows of a prompt's true length in a 16-bit format; rows after them are zero and are not stored.
`prompt_<hash>` holds the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import attrs
import numpy as np
import torch
from torch import Tensor

from sftk.data.choices import FilePath
from sftk.data.lmdb_layout import ABOUT, get_value, open_environment
from sftk.errors import DataError
from sftk.models.text import pad_rows

Format = Literal["bf16", "fp16"]
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_EMBEDDING, _PROMPT = b"embedding_", b"prompt_"
KIND = "prompt embeddings"
"""What such a store says that it is."""


@attrs.frozen
class EmbeddingStore:
    """Embeddings that `sftk.data.embed.embed_prompts` has written.

    Args:
        path: the environment.
        shape: rows of an embedding, padding among them, and their width.
        format: of the stored rows.

    Example:
        >>> import tempfile
        >>> from sftk.data.embed import embed_prompts
        >>> path = Path(tempfile.mkdtemp()) / "embeds"
        >>> embed_prompts(["a 3 moving left", "a 7 moving up", "a 3  moving left"], path, "digits")
        Embedded(written=2, there=1)
        >>> store = EmbeddingStore.open(path)
        >>> store.shape, store["a 3 moving left"].shape
        ((4, 32), torch.Size([4, 32]))
    """

    path: Path
    shape: tuple[int, int]
    format: Format

    @classmethod
    def open(cls, path: str | Path) -> EmbeddingStore:
        """Opens a store; the environment stays open in this process.

        Raises:
            DataError: it is missing, damaged, or no store of embeddings.
        """
        path = Path(path)
        with open_environment(path).begin() as transaction:
            text = get_value(transaction, ABOUT, path)
        about = {} if text is None else json.loads(text)
        if about.get("kind") != KIND:
            raise DataError(f"{path} is an LMDB, but holds no prompt embeddings; make them with `sftk data embed PROMPTS OUT`")
        return cls(path, (about["text_len"], about["text_dim"]), about["format"])

    def __contains__(self, prompt: str) -> bool:
        return self._value(prompt) is not None

    def __getitem__(self, prompt: str) -> Tensor:
        """[rows, width] float32, zero after the true length.

        Raises:
            DataError: the prompt was not embedded, or its record is damaged.
        """
        value = self._value(prompt)
        if value is None:
            shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
            raise DataError(f"{self.path} has no embedding of {shown!r}; add it with `sftk data embed PROMPTS {self.path}`")
        length, width = self.shape
        if len(value) % (2 * width) or len(value) > 2 * width * length:
            expected = f"up to {length} rows of {2 * width} bytes"
            raise DataError(f"{self.path}: the embedding of {prompt[:60]!r} has {len(value)} bytes; expected {expected}")
        bits = torch.from_numpy(np.frombuffer(value, dtype="<i2").astype(np.int16))
        return pad_rows(bits.view(FORMATS[self.format]).reshape(-1, width), length)

    def prompts(self) -> dict[str, int]:
        """The prompts, and how many rows each has."""
        rows, width = {}, self.shape[1]
        with open_environment(self.path).begin() as transaction:
            for key, value in transaction.cursor():
                if key.startswith(_PROMPT):
                    embedding = get_value(transaction, _EMBEDDING + key.removeprefix(_PROMPT), self.path)
                    rows[value.decode()] = len(embedding or b"") // (2 * width)
        return rows

    def _value(self, prompt: str) -> bytes | None:
        with open_environment(self.path).begin() as transaction:
            return get_value(transaction, embedding_key(prompt), self.path)


def embedding_key(prompt: str) -> bytes:
    """Key of a prompt's record. LMDB keys are short, so that the text is hashed.

    Example:
        >>> embedding_key(" a  fox ") == embedding_key("a fox") and len(embedding_key("a fox"))
        74
    """
    return _EMBEDDING + _hash(prompt)


def text_key(prompt: str) -> bytes:
    """Key of a prompt's text."""
    return _PROMPT + _hash(prompt)


def _hash(prompt: str) -> bytes:
    # White space alone: how else a prompt is cleaned depends on what is installed.
    return hashlib.sha256(" ".join(prompt.split()).encode()).hexdigest().encode()


@attrs.frozen(kw_only=True)
class StoredEmbedder:
    """Reads embeddings that `sftk data embed` has computed, so that no process holds the encoder.

    Args:
        path: the store.
        text_len, text_dim: of the embeddings; the store's must be the same.

    Raises:
        DataError: when it is first used: the store is missing or of other sizes, or lacks a prompt.

    Example:
        >>> StoredEmbedder(path="data/embeds").shape
        (512, 4096)
    """

    path: FilePath
    text_len: int = 512
    text_dim: int = 4096

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a prompt and their width."""
        return self.text_len, self.text_dim

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        store = EmbeddingStore.open(self.path)
        if store.shape != self.shape:
            found, width = store.shape
            raise DataError(f"{self.path} holds embeddings of {found} x {width}; set text_len: {found}, text_dim: {width}")
        return torch.stack([store[prompt] for prompt in prompts])
