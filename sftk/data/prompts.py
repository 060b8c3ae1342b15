"""Prompt files and the data set `prompts`: texts without pictures, for objectives that make their own clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from sftk.data.choices import Choice, FilePath
from sftk.data.embedders import Embedder, make_embedder, text_shapes
from sftk.errors import DataError


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line. Blank lines and lines that begin with # are left out.

    Args:
        path: UTF-8, with or without a byte order mark.

    Raises:
        DataError: the file is missing, is not UTF-8, or holds no prompt.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "prompts.txt"
        >>> _ = file.write_text("# digits\\n\\na 3 moving left\\n  an 8 moving up\\n")
        >>> read_prompts(file)
        ('a 3 moving left', 'an 8 moving up')
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the prompt file {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line} is not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8") from error
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise DataError(f"the prompt file {path} holds no prompt; expected one a line (# begins a comment)")
    return prompts


def read_extended(path: str | Path, prompts: tuple[str, ...], of: str | Path) -> tuple[str, ...]:
    """Longer versions of prompts, line by line.

    Args:
        path: a prompt file with one line for each prompt.
        prompts: of the file `of`.

    Raises:
        DataError: as `read_prompts`, or the numbers differ.
    """
    extended = read_prompts(path)
    if len(extended) != len(prompts):
        raise DataError(f"{path} has {len(extended)} prompts, {of} has {len(prompts)}; the extended prompts go line by line")
    return extended


def first_prompts(prompts: tuple[str, ...], count: int | None, of: str | Path) -> tuple[str, ...]:
    """The first so many prompts, or all.

    Args:
        of: the file that they come from, for errors.

    Raises:
        DataError: there are fewer, or none is asked for.

    Example:
        >>> first_prompts(("a fox", "a hare"), 1, "prompts.txt")
        ('a fox',)
    """
    if count is not None and not 1 <= count <= len(prompts):
        raise DataError(f"the first {count} prompts are asked for, {of} has {len(prompts)}; expected 1 to {len(prompts)}")
    return prompts[:count]


@attrs.frozen(eq=False)
class TextKeys:
    """Adds the embeddings of a prompt to a sample.

    Args:
        embedder: of the prompts.
        negative: the unconditional prompt.
    """

    embedder: Embedder
    negative: str = ""
    negative_embeds: Tensor = attrs.field(
        init=False, repr=False, default=attrs.Factory(lambda self: self.embedder([self.negative])[0], True)
    )

    def __call__(self, prompt: str) -> dict[str, Any]:
        """`prompt`, `prompt_embeds` [L, D] and `negative_embeds` [L, D]."""
        return {"prompt": prompt, "prompt_embeds": self.embedder([prompt])[0], "negative_embeds": self.negative_embeds}


@attrs.frozen(eq=False)
class Prompts:
    """A map-style data set of the prompts in a file.

    Args:
        path: the prompt file.
        text: the embedder.
        extended: a second file whose lines are embedded in the place of the first one's.
        first: take only so many prompts from the beginning; None takes all.
        negative: the unconditional prompt.
        frames, seed: not used; a data set of prompts holds no clips.

    Keys of a sample:
        prompt str; prompt_embeds, negative_embeds [L, D] float32.

    Raises:
        DataError: a file cannot be used.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "prompts.txt"
        >>> _ = file.write_text("a 3 moving left")
        >>> Prompts(str(file), text="digits")[0]["prompt_embeds"].shape
        torch.Size([4, 32])
    """

    path: FilePath
    text: Choice
    extended: FilePath | None = None
    first: int | None = None
    negative: str = ""
    frames: int = 1
    seed: int = 0
    prompts: tuple[str, ...] = attrs.field(init=False, repr=False)
    keys: TextKeys = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        prompts = read_prompts(self.path)
        if self.extended is not None:
            prompts = read_extended(self.extended, prompts, self.path)
        object.__setattr__(self, "prompts", first_prompts(prompts, self.first, self.path))
        object.__setattr__(self, "keys", TextKeys(make_embedder(self.text), self.negative))

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.keys(self.prompts[index])


def prompts_shapes(*, text: Choice, **_: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a sample's tensors, known without the file."""
    return text_shapes(text)
