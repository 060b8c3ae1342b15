"""Data sets that read LMDB stores: `latents` of real clips, and `ode_pairs` of a teacher's trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from sftk.data.choices import Choice, FilePath
from sftk.data.embedders import make_embedder, text_shapes
from sftk.data.lmdb_store import LatentStore, check_latents
from sftk.data.prompts import TextKeys
from sftk.errors import DataError


@attrs.frozen(eq=False)
class StoredLatents:
    """A map-style data set of clean latents and prompts in a store.

    Args:
        path: the store, see `LatentStore.open`.
        text: embeds the prompts.
        frames, channels, height, width: of the recipe's latents; the store's must be the same.
        negative: the unconditional prompt.
        codec: decodes latents, for samples; not used here.
        skip_bad: leave out what cannot be used; `bad` lists it.
        seed: not used.

    Keys of a sample:
        latents [F, C, H, W] float32, the last of the record's S states; prompt str; prompt_embeds, negative_embeds [L, D].

    Raises:
        DataError: the store cannot be used, or holds latents of another size.

    Example:
        >>> import tempfile, torch
        >>> from sftk.data.lmdb_store import write_store
        >>> path = tempfile.mkdtemp() + "/store"
        >>> write_store(path, [(torch.ones(2, 4, 8, 8), "a 3 moving left")])
        >>> StoredLatents(path, text="digits", frames=2, channels=4, height=8, width=8)[0]["latents"].shape
        torch.Size([2, 4, 8, 8])
    """

    path: FilePath
    text: Choice
    frames: int
    channels: int
    height: int
    width: int
    negative: str = ""
    codec: Choice | None = None
    skip_bad: bool = False
    seed: int = 0
    store: LatentStore = attrs.field(init=False, repr=False)
    keys: TextKeys = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        store = LatentStore.open(self.path, skip_bad=self.skip_bad)
        check_latents(store, (self.frames, self.channels, self.height, self.width))
        object.__setattr__(self, "store", store)
        object.__setattr__(self, "keys", TextKeys(make_embedder(self.text), self.negative))

    @property
    def bad(self) -> tuple[str, ...]:
        """What was left out."""
        return self.store.bad

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        latents, prompt = self.store[index]
        return {"latents": latents[-1], **self.keys(prompt)}


@attrs.frozen(eq=False)
class StoredPairs:
    """A map-style data set of ODE pairs: what a teacher's solver went through, noisiest first and clean last.

    Args:
        data: the store.
        steps: states of a record, S.
        size: samples; None for all records.

    Keys of a sample:
        those of `StoredLatents`, and ode_latents [S, F, C, H, W].

    Raises:
        DataError: the records hold another number of states, or there are fewer than `size`.
    """

    data: StoredLatents
    steps: int
    size: int | None = None

    def __attrs_post_init__(self) -> None:
        store = self.data.store
        _check_states(store, self.steps)
        if self.size is not None and len(store) < self.size and not store.bad:
            raise DataError(
                f"{store.path} holds {len(store)} ODE pairs, the recipe asks for {self.size}; "
                "make the others with `sftk data ode-pairs RECIPE`"
            )

    @property
    def bad(self) -> tuple[str, ...]:
        """What was left out."""
        return self.data.bad

    def __len__(self) -> int:
        return len(self.data) if self.size is None else min(self.size, len(self.data))

    def __getitem__(self, index: int) -> dict[str, Any]:
        latents, prompt = self.data.store[index]
        return {"ode_latents": latents, "latents": latents[-1], **self.data.keys(prompt)}


def latents_shapes(
    *, text: Choice, frames: int, channels: int, height: int, width: int, **_: Any
) -> dict[str, tuple[int, ...]]:
    """Shapes of a sample's tensors, known without the store."""
    return {"latents": (frames, channels, height, width), **text_shapes(text)}


def check_stored(
    *,
    path: str,
    frames: int,
    channels: int,
    height: int,
    width: int,
    skip_bad: bool = False,
    steps: int | None = None,
    **_: Any,
) -> None:
    """Checks what a store says of itself against a recipe; no record is read. One that is not there yet is not looked at.

    Args:
        steps: states of a record, S; None takes any number.

    Raises:
        DataError: the store cannot be used, or holds latents of another size.

    Example:
        >>> import tempfile, torch
        >>> from sftk.data.lmdb_store import write_store
        >>> path = tempfile.mkdtemp() + "/store"
        >>> write_store(path, [(torch.ones(2, 4, 8, 8), "a 3 moving left")])
        >>> check_stored(path=path, frames=2, channels=4, height=8, width=8)
    """
    if not Path(path).exists():
        return
    store = LatentStore.glance(path, skip_bad=skip_bad)
    if not store.shards:
        return
    if steps is not None:
        _check_states(store, steps)
    check_latents(store, (frames, channels, height, width))


def _check_states(store: LatentStore, steps: int) -> None:
    if store.shape[0] != steps:
        raise DataError(f"the records of {store.path} hold {store.shape[0]} states, `keep` lists {steps}")
