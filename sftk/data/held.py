"""What codecs and text embedders hold once they are loaded, known before a value is read."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import attrs

from sftk.errors import SftkError


@runtime_checkable
class HoldsWeights(Protocol):
    """A codec or an embedder that loads weights when it is first used.

    `inspect`: looks at the names and shapes in its files, and says how many weights there are; raises what loading them would
    raise. `published`: how many the public ones have. `bytes_each`: of a weight in memory. `on_device`: whether they lie on the
    GPU where there is one.
    """

    def inspect(self) -> int: ...

    @property
    def published(self) -> int: ...

    @property
    def bytes_each(self) -> int: ...

    @property
    def on_device(self) -> bool: ...


@attrs.frozen(kw_only=True)
class Held:
    """Weights of something that is loaded: how many, their bytes, and whether they lie on the GPU where there is one."""

    parameters: int
    bytes: int
    on_device: bool


def held_weights(made: Any) -> Held | None:
    """What a codec or an embedder will hold; from its files where they are here and whole, else as published.

    Args:
        made: from `make_codec` or `make_embedder`.

    Returns:
        None where it holds nothing.

    Example:
        >>> from sftk.data.codecs import make_codec
        >>> held_weights(make_codec({"use": "wan_vae", "with": {"path": "wan_models/Wan2.1-T2V-1.3B"}}))
        Held(parameters=126892531, bytes=507570124, on_device=True)
        >>> held_weights(make_codec("digits"))
    """
    if not isinstance(made, HoldsWeights):
        return None
    try:
        count = made.inspect()
    except SftkError:  # not here, broken, or its library is not installed
        count = made.published
    return Held(parameters=count, bytes=count * made.bytes_each, on_device=made.on_device)
