"""What is wrong with a recipe's `sample` section, without loading anything."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from sftk.data.choices import Choice, choice_findings
from sftk.data.codecs import CODECS, make_codec
from sftk.data.embedders import EMBEDDERS, make_embedder
from sftk.errors import DataError, did_you_mean
from sftk.spec.data_files import Places, choice_files
from sftk.spec.sampling import SampleSection, sampling_problems
from sftk.spec.schema import AUTO, Recipe

Finding = tuple[tuple[str | int, ...], str, str | None]


def sample_files(section: SampleSection) -> Places:
    """Where a section names a file, and which.

    Example:
        >>> list(sample_files(SampleSection(codec={"use": "wan_vae", "with": {"path": "vae"}})))
        [(('codec', 'with', 'path'), 'vae')]
    """
    for option, choice in sample_choices(section):
        for path, name in choice_files(option, choice):
            yield (option, *path), name


def sample_choices(section: SampleSection) -> tuple[tuple[str, Choice | None], ...]:
    """What embeds prompts and what decodes latents, by the key of each."""
    return ("text", section.text), ("codec", section.codec)


def sample_findings(recipe: Recipe) -> Iterator[Finding]:
    """Where in the section something is wrong, what, and the hint.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> list(sample_findings(load_recipe("recipes/dmd.yaml")[0].recipe))
        []
    """
    section, backbones = recipe.sample, {role: model for role, model in recipe.models.items() if model.size is not None}
    for role, sampling in section.roles.items():
        if role not in backbones:
            yield ("roles", role), f"{role!r} is not a backbone of this recipe", did_you_mean(role, backbones)
        for problem in sampling_problems(sampling, recipe.latents.frames):
            yield ("roles", role, *problem.path), problem.message, problem.hint
    codec: Any = yield from _made("codec", CODECS, section.codec, make_codec)
    if codec is not None and codec.channels != recipe.latents.channels:
        message = f"the codec decodes {codec.channels} channels, the latents have {recipe.latents.channels}"
        yield (
            ("codec",),
            message,
            f"name a codec of {recipe.latents.channels} channels, or set latents.channels: {codec.channels}",
        )
    text: Any = yield from _made("text", EMBEDDERS, section.text, make_embedder)
    for role in section.roles:
        model = backbones.get(role)
        if text is None or model is None or model.size == AUTO:
            continue
        if text.shape[1] != model.config.text_dim:
            message = f"rows of {text.shape[1]} from the text embedder, {role!r} takes {model.config.text_dim}"
            yield ("text",), message, f"name an embedder whose rows are as wide, or a size whose text_dim is {text.shape[1]}"


def _made(
    name: str, registry: Mapping[str, Callable[..., Any]], choice: Any, make: Callable[[Any], Any]
) -> Generator[Finding, None, Any]:
    """What a choice names, or None where it is wrong, which is said."""
    if choice is None:
        return None
    kind = {"text": "text embedder"}.get(name, name)
    findings = list(choice_findings(kind, registry, choice))
    for path, message, hint in findings:
        yield (name, *path), message, hint
    if findings:
        return None
    try:
        return make(choice)
    except DataError as error:
        yield (name,), str(error), None
    return None
