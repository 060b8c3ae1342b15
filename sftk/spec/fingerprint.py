"""What of a recipe decides the course of a training, so that a run can be resumed only by the recipe that began it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sftk.spec.convert import unstructure
from sftk.spec.recipe import Stage

# What may change in mid-run: words, machines, how work is split, what is written down and how long to train.
FREE = (
    "version",
    "doc",
    "plugins",
    "train",
    "fetch",
    "eval",
    "sample",
    "checkpoint",
    "track",
    "compile",
    "cuda_graphs",
    "triton_kernels",
    "device",
    "parallel",
)
FREE_OF_MODELS = ("backend", "checkpoint", "parallel")
FREE_OF_PHASES = ("graph", "with", "log")


def fingerprint(stage: Stage) -> dict[str, Any]:
    """The decisive part of a stage's recipe as a plain value: defaults filled in, graphs drawn with all their options.

    `train.steps` is part of it where a learning rate depends on it; the weights that updated models began with are not.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/dmd.yaml")
        >>> value = fingerprint(stage)
        >>> value["batch"], value["train"], value["phases"][0]["graph"][0][:14]
        ({'global': 16}, {'steps': 50}, 'dmd_generator(')
    """
    recipe, resolved = stage.recipe, stage.resolved
    value = {key: part for key, part in unstructure(recipe).items() if key not in FREE}
    if any(section.schedule != "constant" for section in recipe.optimizers.values()):
        value["train"] = {"steps": recipe.train.steps}
    value["batch"] = {"global": recipe.batch.global_}
    value["data"] = {"use": recipe.data.use, "with": resolved["data"].get("with", {})}
    updated = {role for phase in recipe.phases for role in phase.roles}
    for role, model in value["models"].items():
        for key in FREE_OF_MODELS:
            model.pop(key, None)
        model["weights"] = None if role in updated else resolved["models"][role].get("weights")
    for phase in value["phases"]:
        for key in FREE_OF_PHASES:
            phase.pop(key, None)
        phase["graph"] = [line.lstrip(" │├└─") for line in stage.graphs[phase["name"]].to_tree().splitlines()]
    return json.loads(json.dumps(value))


def recipe_hash(value: Mapping[str, Any]) -> str:
    """A name for a fingerprint.

    Example:
        >>> recipe_hash({"seed": 0}) == recipe_hash({"seed": 0}) != recipe_hash({"seed": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def first_difference(was: Any, now: Any, path: str = "$") -> str | None:
    """The first place where two plain values differ, in words. A key that is not there is null.

    Example:
        >>> first_difference({"train": {"steps": 3}}, {"train": {"steps": 4}})
        '$.train.steps was 3 and is 4'
    """
    if isinstance(was, dict) and isinstance(now, dict):
        pairs = ((f"{path}.{key}", was.get(key), now.get(key)) for key in {**was, **now})
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = ((f"{path}[{index}]", *pair) for index, pair in enumerate(zip(was, now, strict=True)))
    else:
        return None if was == now else f"{path} was {_shown(was)} and is {_shown(now)}"
    return next(filter(None, (first_difference(a, b, place) for place, a, b in pairs)), None)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
