"""Named data sets: what a recipe's `data.use` may say, and which keys their batches hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor
from torch.utils.data import default_collate

from sftk.core.plugins import extensible
from sftk.data.choices import Finding, call, choice_findings, option_findings, options_of
from sftk.data.codecs import CODECS, Codec, digits_codec, make_codec
from sftk.data.digits import DigitClips, collate, embed_prompts
from sftk.data.embedders import EMBEDDERS, make_embedder
from sftk.data.image_captions import ImageCaptions, image_shapes
from sftk.data.latent_sizes import AXES, say_latents
from sftk.data.ode_pairs import PairPlan, check_pairs, open_pairs, pairs_shapes, plan_findings
from sftk.data.prompts import Prompts, prompts_shapes
from sftk.data.random_clips import RandomClips
from sftk.data.stored import StoredLatents, check_stored, latents_shapes
from sftk.errors import DataError, SpecError, did_you_mean

TEXT_KEYS = ("prompt_embeds", "negative_embeds")

CHOICES = {"text": ("text embedder", EMBEDDERS), "codec": ("codec", CODECS)}
"""Options of data sets that name one of several things: what messages call it, and the registry."""


@attrs.frozen(kw_only=True)
class DataSource:
    """A data set that recipes can name.

    Args:
        make: `make(frames=..., seed=..., **options)` returns a map-style data set whose samples depend on their index alone.
        collate: samples to a batch, a mapping of tensors and lists.
        keys: tensors of a batch that graphs can read.
        embed: prompts to embeddings [B, L, D]; the empty prompt is the unconditional one. None when it has no texts, or when
            its option `text` says how.
        codec: latents to pictures and back; None when it has none, or when its option `codec` says which.
        fps: frames a second at which its videos are shown, see `shown_at`.
        encodes: its samples are made with its codec; else that is for showing them, and for `sftk sample`.
        sample_shape: channels, height and width of its latents, or None when they depend on the data.
        needs_shape: `make` takes channels, height and width as well.
        settings: an attrs class of the options; `make` then takes an instance as its first argument.
        shapes: `shapes(frames=..., channels=..., height=..., width=..., **options)` gives the shapes of a sample's tensors
            without reading anything; None when making a sample is cheap.
        findings: what is wrong with `settings` besides the types of its values.
        files: takes what `shapes` takes, and raises a DataError when files that are there do not fit, as far as a glance shows.
    """

    make: Callable[..., Any]
    collate: Callable[[Any], dict[str, Any]] = collate
    keys: tuple[str, ...]
    embed: Callable[..., Tensor] | None = None
    codec: Codec | None = None
    fps: int = 16
    encodes: bool = False
    sample_shape: tuple[int, int, int] | None = None
    needs_shape: bool = False
    settings: type[Any] | None = None
    shapes: Callable[..., dict[str, tuple[int, ...]]] | None = None
    findings: Callable[[Any], Iterator[Finding]] | None = None
    files: Callable[..., None] | None = None

    def build(self, *, frames: int, channels: int, height: int, width: int, seed: int, options: Mapping[str, Any]) -> Any:
        """The data set for latents of this size.

        Raises:
            DataError: an option is wrong, or the data cannot be used.
        """
        shape = {"channels": channels, "height": height, "width": width} if self.needs_shape else {}
        if self.settings is not None:
            return self.make(call("data", self.settings, options), frames=frames, seed=seed, **shape)
        return call("data", self.make, options, frames=frames, seed=seed, **shape)

    def sample_shapes(
        self, *, frames: int, channels: int, height: int, width: int, options: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]] | None:
        """Shapes of a sample's tensors, where they are known without reading the data."""
        if self.shapes is None:
            return None
        shape = {"frames": frames, "channels": channels, "height": height, "width": width}
        if self.settings is not None:
            return self.shapes(call("data", self.settings, options), **shape)
        return self.shapes(**shape, **options)

    def check_files(self, *, frames: int, channels: int, height: int, width: int, options: Mapping[str, Any]) -> None:
        """Looks at the files that the options name, without reading a sample.

        Raises:
            DataError: they hold something else than a recipe of this size asks for.

        Example:
            >>> options = {"path": "specs", "text": "digits"}
            >>> source("latents").check_files(frames=2, channels=4, height=8, width=8, options=options)
            Traceback (most recent call last):
            sftk.errors.DataError: specs holds no LMDB: neither it nor a folder in it has a data.mdb
        """
        shape = {"frames": frames, "channels": channels, "height": height, "width": width}
        if self.files is not None and self.settings is not None:
            self.files(call("data", self.settings, options), **shape)
        elif self.files is not None:
            self.files(**shape, **options)

    def for_options(self, options: Mapping[str, Any]) -> DataSource:
        """This data set with the embedder and the codec that its options name.

        Example:
            >>> source("prompts").for_options({"text": "digits"}).embed(["a 3 moving left"]).shape
            torch.Size([1, 4, 32])
        """
        embed = make_embedder(options["text"]) if "text" in options and "text" in self.options else self.embed
        codec = make_codec(options["codec"]) if options.get("codec") and "codec" in self.options else self.codec
        return attrs.evolve(self, embed=embed, codec=codec)

    def shown_at(self, options: Mapping[str, Any]) -> int:
        """Frames a second at which its videos are shown: those of the data set that its option `source` names, if there is one.

        Example:
            >>> source("ode_pairs").shown_at({"source": {"use": "digits"}}), source("ode_pairs").shown_at({})
            (8, 16)
        """
        inner = options.get("source") if "source" in self.options else None
        if not isinstance(inner, Mapping) or inner.get("use") not in SOURCES:
            return self.fps
        return SOURCES[str(inner["use"])].shown_at(inner.get("with") or {})

    @property
    def given(self) -> tuple[str, ...]:
        """Arguments of `make` that are no options."""
        return () if self.settings else ("frames", "seed", *(("channels", "height", "width") if self.needs_shape else ()))

    @property
    def options(self) -> dict[str, Any]:
        """Options that a recipe may set, with their annotations."""
        return options_of(self.settings or self.make, self.given)


SOURCES: dict[str, DataSource] = {
    "digits": DataSource(
        make=DigitClips,
        keys=("latents", *TEXT_KEYS, "digit"),
        embed=embed_prompts,
        codec=digits_codec(),
        fps=8,
        sample_shape=(4, 8, 8),
    ),
    "random": DataSource(
        make=RandomClips,
        collate=default_collate,
        keys=("latents", *TEXT_KEYS, "ode_latents", "initial_latents"),
        needs_shape=True,
    ),
    "prompts": DataSource(make=Prompts, keys=TEXT_KEYS, shapes=prompts_shapes),
    "latents": DataSource(
        make=StoredLatents, keys=("latents", *TEXT_KEYS), needs_shape=True, shapes=latents_shapes, files=check_stored
    ),
    "image_captions": DataSource(
        make=ImageCaptions, keys=("initial_latents", *TEXT_KEYS), needs_shape=True, shapes=image_shapes, encodes=True
    ),
    "ode_pairs": DataSource(
        make=open_pairs,
        keys=("ode_latents", "latents", *TEXT_KEYS),
        needs_shape=True,
        settings=PairPlan,
        shapes=pairs_shapes,
        findings=plan_findings,
        files=check_pairs,
    ),
}
"""Data sets by name; a plugin may add its own."""
extensible(SOURCES)


def source(name: str) -> DataSource:
    """A named data set.

    Raises:
        SpecError: there is none of that name.

    Example:
        >>> source("digits").keys
        ('latents', 'prompt_embeds', 'negative_embeds', 'digit')
    """
    if name not in SOURCES:
        raise SpecError(f"unknown data set {name!r}; {did_you_mean(name, SOURCES)}")
    return SOURCES[name]


def data_keys(name: str) -> tuple[str, ...]:
    """Keys of a named data set's batches; none when there is no such data set."""
    return SOURCES[name].keys if name in SOURCES else ()


def data_problems(name: str, options: Mapping[str, Any], frames: int, shape: tuple[int, int, int]) -> Iterator[Finding]:
    """What is wrong with a recipe's data section: (path, message, hint).

    Example:
        >>> [message for _, message, _ in data_problems("digitz", {}, 21, (4, 8, 8))]
        ["unknown data set 'digitz'"]
    """
    if name not in SOURCES:
        yield ("use",), f"unknown data set {name!r}", did_you_mean(name, SOURCES)
        return
    found = SOURCES[name]
    wrong = list(option_findings(name, found.settings or found.make, options, found.given))
    for path, message, hint in (*wrong, *_named(found, options, frames, shape)):
        yield ("with", *path), message, hint
    if found.sample_shape is not None and found.sample_shape != shape:
        message = f"{name} has latents of {found.sample_shape}, the recipe says {shape} (channels, height, width)"
        yield (), message, say_latents(dict(zip(AXES[1:], found.sample_shape, strict=True)))
    if found.settings is not None and not wrong:
        try:
            settings = call(name, found.settings, options)
        except DataError as error:
            yield ("with",), str(error), None
            return
        for path, message, hint in found.findings(settings) if found.findings else ():
            yield ("with", *path), message, hint


def _named(found: DataSource, options: Mapping[str, Any], frames: int, shape: tuple[int, int, int]) -> Iterator[Finding]:
    """What is wrong with options that name an embedder, a codec or another data set."""
    for option, (kind, registry) in CHOICES.items():
        if option in found.options and isinstance(options.get(option), str | Mapping):
            for path, message, hint in choice_findings(kind, registry, options[option]):
                yield (option, *path), message, hint
    inner = options.get("source")
    if "source" in found.options and isinstance(inner, Mapping):
        for key in inner:
            if key not in ("use", "with"):
                yield ("source", key), f"a source has no key {key!r}", "expected `use` and `with`"
        for path, message, hint in data_problems(str(inner.get("use")), inner.get("with") or {}, frames, shape):
            yield ("source", *path), message, hint


def option_default(name: str, option: str) -> Any:
    """The default of a data set's option: a value, an attrs factory, or `attrs.NOTHING` when it must be given.

    Example:
        >>> option_default("digits", "size")
        65536
    """
    found = SOURCES[name]
    if found.settings is not None:
        return attrs.fields_dict(found.settings)[option].default
    default = inspect.signature(found.make).parameters[option].default
    return attrs.NOTHING if default is inspect.Parameter.empty else default


__all__ = ["SOURCES", "DataSource", "data_keys", "data_problems", "option_default", "source"]
