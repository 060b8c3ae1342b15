"""What makes a recipe's backbones fast on a device: compiled blocks, Triton kernels, CUDA graphs; what `auto` stands for."""

from __future__ import annotations

import importlib.util

import torch

from sftk.errors import SpecError
from sftk.models.config import WanConfig
from sftk.spec.schema import Recipe

COMPILED_FROM = 50_000_000
"""Weights of the largest backbone from which `compile: auto` compiles: a smaller one's run ends before its compilation pays."""


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether a recipe's blocks and segments are compiled on a device; `auto` does so on CUDA for backbones of some size.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> recipes = [load_recipe(name)[0].recipe for name in ("recipes/dmd.yaml", "recipes/wan-1.3b/dmd.yaml")]
        >>> [compiles(recipe, torch.device(kind)) for recipe in recipes for kind in ("cpu", "cuda")]
        [False, False, False, True]
    """
    if recipe.compile != "auto":
        return recipe.compile
    weights = [(8 * c.dim**2 + 2 * c.dim * c.ffn_dim) * c.num_layers for c in backbones(recipe)]
    return device.type == "cuda" and max(weights, default=0) >= COMPILED_FROM


def fuses(recipe: Recipe, device: torch.device) -> bool:
    """Whether backbones compute by Triton kernels what lies between their products; `auto` is bf16 on CUDA with triton there.

    Raises:
        SpecError: it asks for them where there are none.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> fuses(load_recipe("recipes/wan-1.3b/dmd.yaml")[0].recipe, torch.device("cpu"))
        False
    """
    able = device.type == "cuda" and recipe.precision == "bf16" and importlib.util.find_spec("triton") is not None
    if recipe.triton_kernels is True and not able:
        raise SpecError(
            f"triton_kernels: true needs a CUDA device, precision: bf16 and the package triton; found {device.type!r} and "
            f"{recipe.precision!r}; set triton_kernels: auto"
        )
    return able and bool(recipe.triton_kernels)


def replays_passes(recipe: Recipe, device: torch.device) -> bool:
    """Whether a recipe's cached passes without gradient are replayed as CUDA graphs on a device; `auto` is where it compiles.

    Raises:
        SpecError: it asks for them, and the device has none.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> (stage,) = load_recipe("recipes/wan-1.3b/dmd.yaml")
        >>> [replays_passes(stage.recipe, torch.device(kind)) for kind in ("cpu", "cuda")]
        [False, True]
    """
    if recipe.cuda_graphs == "auto":
        return device.type == "cuda" and compiles(recipe, device)
    if recipe.cuda_graphs and device.type != "cuda":
        raise SpecError(f"cuda_graphs: true needs a CUDA device, found {device.type!r}; set cuda_graphs: auto")
    return recipe.cuda_graphs


def backbones(recipe: Recipe) -> tuple[WanConfig, ...]:
    """The sizes of a recipe's backbones.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> {config.dim for config in backbones(load_recipe("recipes/wan-14b/dmd.yaml")[0].recipe)}
        {1536, 5120}
    """
    return tuple(model.config for model in recipe.models.values() if model.size is not None)
