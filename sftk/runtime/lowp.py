"""Linear layers that compute in fp8: where no gradient is asked for, where one is, or both."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

from sftk.errors import Problem, ShapeError, SpecError
from sftk.functional.fp8_linear import fp8_product, product_bias
from sftk.functional.fp8_rounding import fp8_gelu_rows
from sftk.functional.packed import Packed, pack
from sftk.models.held_linear import HalfLinear, HeldLinear, hold_linears
from sftk.models.precision import autocast_to
from sftk.spec.lowp import LowpSection
from sftk.spec.schema import Recipe

CAPABILITY = (8, 9)
"""Compute capability from which a GPU multiplies in fp8: Ada and Hopper."""


class Fp8Linear(HeldLinear):
    """A linear layer whose calls without gradient multiply in fp8.

    Args:
        linear: gives its weight and bias, which stay the same parameters under the same names.
        trains_fp8: so do its calls with gradient, see `fp8_training_linear`; otherwise these are of the layer that it was.

    Example:
        >>> layer = Fp8Linear(nn.Linear(16, 32))
        >>> with torch.no_grad():
        ...     rounded = layer(torch.ones(1, 16))
        >>> bool((rounded - layer(torch.ones(1, 16))).any()), rounded.dtype, sorted(layer.state_dict())
        (True, torch.float32, ['bias', 'weight'])
    """

    def __init__(self, linear: nn.Linear, *, trains_fp8: bool = False):
        super().__init__(linear, trains_fp8=trains_fp8)
        self.released = False

    def make(self) -> tuple[Packed, Tensor | None]:
        """The weight in fp8, with a scale for each row, and the bias as products add it."""
        weight = self.held[0] if self.released else pack(self.weight.detach(), "fp8")
        return weight, None if self.bias is None else product_bias(self.bias, weight)

    def parts(self, held: tuple[Packed, Tensor | None]) -> tuple[Tensor, ...]:
        """Codes, scales and bias."""
        weight, bias = held
        return (weight.codes, weight.scale) if bias is None else (weight.codes, weight.scale, bias)

    def product(self, x: Tensor, bias: Tensor | None, rows: Packed | None = None) -> Tensor:
        if self.released:
            raise ShapeError("a model that keeps its weights in fp8 alone was called with gradient; set its linears: full")
        return super().product(x, bias, rows)

    @property
    def rounds_input(self) -> bool:
        return self.without_gradient or self.trains_now  # a compiler does not follow a property of `super()`

    def forward(self, x: Tensor, rows: Packed | None = None) -> Tensor:
        if not self.without_gradient:
            return self.product(x, self.bias, rows)
        return self._multiplied(self.round_input(x) if rows is None else rows, x)

    @property
    def takes_gelu(self) -> bool:
        return self.without_gradient

    def after_gelu(self, x: Tensor) -> Tensor:
        if not self.without_gradient:
            return super().after_gelu(x)
        x = autocast_to(x)
        return self._multiplied(Packed(*fp8_gelu_rows(x.detach())), x)

    def _multiplied(self, rows: Packed, like: Tensor) -> Tensor:
        """The product of rounded tokens and the weight, in the shape and dtype that a call with `like` returns."""
        weight, bias = (pack(self.weight, "fp8"), self.bias) if self.held is None else self.held
        found = fp8_product(rows, weight, bias).unflatten(0, like.shape[:-1])
        return found.to(autocast_to(like).dtype)

    def release(self) -> None:
        """Keeps the weight in fp8 alone; the bias is followed as before."""
        self.refresh()
        self.released, self.weight = True, nn.Parameter(self.weight.new_empty(0), requires_grad=False)


def use_fp8(model: nn.Module, *, hold: bool, lowp: LowpSection | None = None) -> nn.Module:
    """Puts layers that compute in fp8 in the place of every linear layer of a backbone's blocks, in place.

    Embeddings and the head stay as they are: they are small, and what they lose is seen at once.

    Args:
        model: has `blocks`.
        hold: keep the weights in another form, too, and make it anew when they were changed: in fp8, a byte for each, or where
            only calls with gradient compute in fp8, in bfloat16. Otherwise each call rounds what it has, as is needed for
            sharded weights, which it gathers; calls with gradient always do.
        lowp: which calls, of `linears` and `training`; None are those without gradient.

    Returns:
        The model.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> model = use_fp8(WanModel(preset("digits")), hold=True)
        >>> sum(isinstance(layer, Fp8Linear) for layer in model.modules())
        40
    """
    lowp = lowp or LowpSection(linears="fp8")
    kind = Fp8Linear if lowp.linears == "fp8" else HalfLinear
    return hold_linears(model, functools.partial(kind, trains_fp8=lowp.training == "fp8"), hold=hold)


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
    asked = {role: model.lowp.over(recipe.lowp).fp8 for role, model in recipe.models.items() if model.size is not None}
    asked = {role: keys for role, keys in asked.items() if keys}
    if not asked or device.type != "cuda":
        return
    key = next(iter(asked.values()))[0]
    names, instead = ", ".join(asked), f"{key}: full"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        message = f"{names} would compute in fp8, which {name} (compute capability {major}.{minor}) does not do"
        hint = f"take a GPU of 8.9 or above, such as an H100, or {instead}"
        raise SpecError([Problem(path=("lowp", key), message=message, hint=hint)])
    if any("attention" in keys for keys in asked.values()) and importlib.util.find_spec("triton") is None:
        message = "attention in fp8 is a kernel in Triton, and the package triton is not installed"
        raise SpecError([Problem(path=("lowp", "attention"), message=message, hint="install triton, or attention: full")])
