"""Linear layers that compute in fp8 where no gradient is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sftk.errors import Problem, ShapeError, SpecError
from sftk.functional.fp8_linear import fp8_linear
from sftk.functional.packed import Packed, pack
from sftk.models.held_linear import HeldLinear, hold_linears
from sftk.spec.schema import Recipe

CAPABILITY = (8, 9)
"""Compute capability from which a GPU multiplies in fp8: Ada and Hopper."""


class Fp8Linear(HeldLinear):
    """A linear layer whose calls without gradient multiply in fp8; with gradient it is the layer that it was made from.

    Args:
        linear: gives its weight and bias, which stay the same parameters under the same names.

    Example:
        >>> layer = Fp8Linear(nn.Linear(16, 32))
        >>> with torch.no_grad():
        ...     rounded = layer(torch.ones(1, 16))
        >>> bool((rounded - layer(torch.ones(1, 16))).any()), rounded.dtype, sorted(layer.state_dict())
        (True, torch.float32, ['bias', 'weight'])
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.released = False

    def make(self) -> Packed:
        """The weight in fp8, with a scale for each row."""
        return pack(self.weight.detach(), "fp8")

    def parts(self, held: Packed) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return held.codes, held.scale

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.without_gradient:
            if self.released:
                raise ShapeError("a model that keeps its weights in fp8 alone was called with gradient; set its linears: full")
            return super().forward(x)
        weight = pack(self.weight, "fp8") if self.held is None else self.held
        kind = x.device.type
        return fp8_linear(x, weight, self.bias).to(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        )

    def release(self) -> None:
        """Keeps the weight in fp8 alone."""
        self.refresh()
        self.released, self.weight = True, nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def refresh(self) -> None:
        """Rounds the weight again if it was changed since the last time."""
        if not self.released:
            super().refresh()


def use_fp8(model: nn.Module, *, hold: bool) -> nn.Module:
    """Puts `Fp8Linear` in the place of every linear layer of a backbone's blocks, in place, and returns the model.

    Embeddings and the head stay as they are: they are small, and what they lose is seen at once.

    Args:
        model: has `blocks`.
        hold: keep the weights in fp8, too, a byte for each, and round them anew when they were changed; otherwise each call
            rounds what it has, as is needed for sharded weights, which it gathers.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> model = use_fp8(WanModel(preset("digits")), hold=True)
        >>> sum(isinstance(layer, Fp8Linear) for layer in model.modules())
        40
    """
    return hold_linears(model, Fp8Linear, hold=hold)


def release_weights(model: nn.Module) -> None:
    """Lets a backbone that is never trained nor called with gradient keep the weights of its `Fp8Linear` layers in fp8 alone.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> model = use_fp8(WanModel(preset("digits")), hold=True)
        >>> before = sum(p.numel() for p in model.parameters())
        >>> release_weights(model)
        >>> sum(p.numel() for p in model.parameters()) < 0.2 * before
        True
    """
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.release()


def check_fp8(recipe: Recipe, device: torch.device) -> None:
    """That a device multiplies in fp8 where a recipe asks for it; a CPU computes the reference.

    Raises:
        SpecError: it does not.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> check_fp8(load_recipe("recipes/dmd.yaml", ["lowp.linears=fp8"])[0].recipe, torch.device("cpu"))
    """
    asked = [role for role, model in recipe.models.items() if model.size is not None and model.lowp.over(recipe.lowp) == "fp8"]
    if not asked or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        message = f"{', '.join(asked)} would compute in fp8, which {name} (compute capability {major}.{minor}) does not do"
        hint = "take a GPU of 8.9 or above, such as an H100, or linears: full"
        raise SpecError([Problem(path=("lowp", "linears"), message=message, hint=hint)])
