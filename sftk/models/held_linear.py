"""Linear layers that hold their weight in a second form for calls without gradient, made anew when the weight was changed.

They may compute calls with gradient in fp8, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from sftk.core.numerics import rounds_as_with_gradient
from sftk.functional.attention import is_exact
from sftk.functional.fp8_rounding import fp8_rows
from sftk.functional.packed import Packed
from sftk.models.fp8_training import fp8_training_linear
from sftk.models.precision import autocast_to


class HeldLinear(nn.Linear, ABC):
    """A linear layer with something in `held` that stands for its weight in calls without gradient.

    With gradient it is the layer that it was made from, or that in fp8. Subclasses say what is held, and how it is used.

    Args:
        linear: gives its weight and bias, which stay the same parameters under the same names.
        trains_fp8: calls with gradient are those of `fp8_training_linear`, but for exact derivatives and forward mode.
    """

    def __init__(self, linear: nn.Linear, *, trains_fp8: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.trains_fp8 = trains_fp8
        self.held: Any = None
        self._stamp: tuple[tuple[int, int], ...] | None = None

    @abstractmethod
    def make(self) -> Any:
        """What is to be held, from the weight and the bias as they are."""

    @abstractmethod
    def parts(self, held: Any) -> tuple[Tensor, ...]:
        """The tensors of what is held."""

    @property
    def without_gradient(self) -> bool:
        """Whether a call now carries no gradient, nor has to be as one that does."""
        return not rounds_as_with_gradient() and forward_ad._current_level < 0

    @property
    def trains_now(self) -> bool:
        """Whether a call with gradient would now be that of `fp8_training_linear`."""
        return self.trains_fp8 and not is_exact() and forward_ad._current_level < 0

    @property
    def rounds_input(self) -> bool:
        """Whether a call now multiplies what `round_input` makes of its input, which other layers may have made already."""
        return self.trains_now and not self.without_gradient

    def round_input(self, x: Tensor) -> Packed:
        """The input in fp8, a scale for each token: of a layer or of several."""
        return Packed(*fp8_rows(autocast_to(x).detach()))

    @abstractmethod
    def forward(self, x: Tensor, rows: Packed | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`F.linear` of x, [..., in]; `rows`, if it is given, is `round_input(x)` and `rounds_input` holds."""

    def product(self, x: Tensor, bias: Tensor | None, rows: Packed | None = None) -> Tensor:
        """What the layer returns in a call with gradient, with a bias that may be another tensor than its own."""
        if self.trains_now:
            return fp8_training_linear(x, self.weight, bias, rows)
        return F.linear(x, self.weight, bias)

    @property
    def takes_gelu(self) -> bool:
        """Whether a call now computes GELU, too, where it reads its input: `after_gelu`."""
        return False

    def after_gelu(self, x: Tensor) -> Tensor:
        """What the layer returns for `gelu(x)`, GELU in its tanh form."""
        return self(F.gelu(x, approximate="tanh"))

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes what is held anew if the weight or the bias was changed since the last time."""
        parameters = (parameter for parameter in (self.weight, self.bias) if parameter is not None)
        stamp = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
        if stamp == self._stamp:
            return
        fresh, self._stamp = self.make(), stamp
        if self.held is None or self.parts(self.held)[0].device != self.parts(fresh)[0].device:
            self.held = fresh
            return
        for old, new in zip(self.parts(self.held), self.parts(fresh), strict=True):
            old.copy_(new)  # the same memory, to which compiled code and CUDA graphs may refer


class HalfLinear(HeldLinear):
    """A linear layer in float32 that holds its weight and bias in bfloat16 for calls without gradient under autocast.

    Autocast would make the same numbers in each call, and reads six bytes a weight for it.

    Example:
        >>> layer, x = HalfLinear(nn.Linear(4, 4)), torch.ones(1, 4)
        >>> layer.refresh()
        >>> with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ...     torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        True
    """

    def make(self) -> tuple[Tensor, ...]:
        """Weight and bias, if there is one."""
        return tuple(parameter.detach().to(torch.bfloat16) for parameter in (self.weight, self.bias) if parameter is not None)

    def parts(self, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As they are."""
        return held

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the dtype of a call without gradient."""
        if self.held is not None and dtype == torch.bfloat16 and self.without_gradient:
            return self.held[0], self.held[1] if len(self.held) > 1 else None
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: Tensor, rows: Packed | None = None) -> Tensor:
        if not self.without_gradient:
            return self.product(x, self.bias, rows)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return F.linear(x, *self.weights(torch.get_autocast_dtype(kind)))
        return F.linear(x, self.weight, self.bias)


def hold_linears(model: nn.Module, kind: Callable[[nn.Linear], HeldLinear], *, hold: bool = True) -> nn.Module:
    """Puts layers that hold a second form of their weight in the place of every linear layer of a backbone's blocks, in place.

    Args:
        model: has `blocks`; embeddings and the head stay as they are.
        kind: makes the layer in the place of one.
        hold: look before each call without gradient whether a weight was changed, and then make what is held. Otherwise
            layers compute with what they have.

    Returns:
        The model.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> model = hold_linears(WanModel(preset("digits")), HalfLinear)
        >>> sum(isinstance(layer, HalfLinear) for layer in model.modules())
        40
    """
    blocks = model.get_submodule("blocks")
    layers = [(name, layer) for name, layer in blocks.named_modules() if type(layer) is nn.Linear]
    made = {name: kind(layer) for name, layer in layers}
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(blocks.get_submodule(parent), child, layer)
    if hold:

        def refresh(*_: object) -> None:
            if not torch.is_grad_enabled():
                for layer in made.values():
                    layer.refresh()

        model.register_forward_pre_hook(refresh)
    return model
