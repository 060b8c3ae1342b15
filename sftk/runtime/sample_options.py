"""What a recipe says about sampling one of its models, and what the command line changes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from sftk.data.choices import Choice
from sftk.data.sources import source
from sftk.errors import SpecError
from sftk.functional.attention import Backend
from sftk.runtime.device import Precision
from sftk.runtime.evaluators import evaluation_options
from sftk.spec.convert import structure, unstructure
from sftk.spec.document import Document
from sftk.spec.files import find_file
from sftk.spec.overrides import apply_overrides
from sftk.spec.params import spec_params
from sftk.spec.sampling import METHODS, AnySampling, StudentSampling, change_method, sampling_problems
from sftk.spec.schema import LatentsSection, Recipe
from sftk.spec.validators import above


@attrs.frozen(kw_only=True)
class SampleOptions:
    """How videos are made.

    Args:
        sampling: the method and its options.
        latents: size of the latents; `frames` is how many are made unless told otherwise.
        text, codec: embed prompts, decode latents; null takes the data set's.
        negative: the unconditional prompt.
        fps: pictures a second.
        precision: in which the backbone computes; with `bf16` its weights are loaded in bfloat16, too.
        backend: of attention.
    """

    sampling: AnySampling
    latents: LatentsSection
    text: Choice | None = None
    codec: Choice | None = None
    negative: str = ""
    fps: float = attrs.field(default=16, validator=above(0))
    precision: Precision = "fp32"
    backend: Backend = "auto"


def sample_options(document: Document, recipe: Recipe, role: str, overrides: Sequence[str] = ()) -> SampleOptions:
    """How a role of a recipe samples, with overrides (`sampling.window=21`).

    A changed `sampling.method` keeps what both methods have in common.

    Raises:
        SpecError: an override is wrong; every problem is listed, with the override.
    """
    section = recipe.sample
    values: dict[str, Any] = {
        "sampling": unstructure(role_sampling(document, recipe, role)),
        "latents": unstructure(recipe.latents),
        "text": section.text or recipe.data.with_.get("text"),
        "codec": section.codec or recipe.data.with_.get("codec"),
        "negative": recipe.data.with_.get("negative", "") if section.negative is None else section.negative,
        "fps": frame_rate(recipe),
        "precision": recipe.precision,
        "backend": recipe.models[role].backend if role in recipe.models else "auto",
    }
    base = Document(value=values, file=document.file)
    changed = apply_overrides(base, overrides)
    method = changed.get(("sampling", "method"), None)
    if method in METHODS and method != values["sampling"]["method"]:
        values["sampling"] = change_method(values["sampling"], method)
        changed = apply_overrides(attrs.evolve(base, value=values), overrides)
    options = structure(changed, SampleOptions)
    problems = sampling_problems(options.sampling, options.latents.frames)
    if problems:
        raise SpecError([changed.problem(("sampling", *p.path), p.message, p.hint) for p in problems])
    return options


def frame_rate(recipe: Recipe) -> float:
    """Pictures a second of the videos that a recipe's models make: as `sample` says, else as its data are shown.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> frame_rate(load_recipe("recipes/digits/dmd.yaml")[-1].recipe)
        8
    """
    fps = recipe.sample.fps
    return source(recipe.data.use).shown_at(recipe.data.with_) if fps is None else fps


def role_sampling(document: Document, recipe: Recipe, role: str) -> AnySampling:
    """How a role samples: as `sample` says, else as it is evaluated, else as the phases' rollouts are bound."""
    if role in recipe.sample.roles:
        return recipe.sample.roles[role]
    if recipe.eval is not None:
        options = evaluation_options(document, recipe)
        if getattr(options, "teacher", None) == role and getattr(options, "student", None) != role:
            return options.teacher_sampling
        if getattr(options, "student", None) is not None:
            return options.student_sampling
    known = {field.name for field in attrs.fields(StudentSampling)}
    bound: dict[str, Any] = {}
    for phase in recipe.phases:
        declared = spec_params(find_file(phase.graph)) if phase.graph is not None else {}
        declared |= recipe.lowp.defaults
        bound |= {name: phase.with_.get(name, declared[name]) for name in declared if name in known}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in bound.items() if not _is_reference(v)}
    return StudentSampling(**values)


def sampled_role(document: Document, recipe: Recipe) -> str:
    """Which role is sampled unless told: the first of `sample`, else the evaluated student, else the trained one."""
    if recipe.sample.roles:
        return next(iter(recipe.sample.roles))
    if recipe.eval is not None and getattr(evaluation_options(document, recipe), "student", None) is not None:
        return evaluation_options(document, recipe).student
    updated = [role for phase in recipe.phases for role in phase.roles]
    return "generator" if "generator" in updated else updated[0]


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$")
