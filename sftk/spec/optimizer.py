"""What a recipe says about an optimiser: its kind, the course of its learning rate, parameters that are treated otherwise."""

from __future__ import annotations

from typing import Literal

import attrs

from sftk.spec.validators import at_least, within


def _share(instance: object, attribute: attrs.Attribute, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{attribute.name} must lie in [0, 1], found {value}")


def _some(instance: object, attribute: attrs.Attribute, value: tuple[str, ...]) -> None:
    if not value:
        raise ValueError("a group names at least one parameter, such as '*.bias'")


@attrs.frozen(kw_only=True)
class OptimizerGroup:
    """Parameters of a role that are treated otherwise than the rest.

    Args:
        match: their names, as in a checkpoint, with `*` for any text; the first group that matches a parameter takes it.
        lr_scale: times the role's learning rate.
        weight_decay: null is the role's.
    """

    match: tuple[str, ...] = attrs.field(validator=_some)
    lr_scale: float = attrs.field(default=1.0, validator=at_least(0))
    weight_decay: float | None = attrs.field(default=None, validator=at_least(0))


@attrs.frozen(kw_only=True)
class OptimizerSection:
    """AdamW and the course of its learning rate: `warmup` updates up, then constant, cosine or linear decay to `final`.

    The decay begins after the share `decay_from` of all steps; `final` is a share of `lr`. `adamw_8bit` keeps its states in a
    byte each (arXiv 2110.02861), through torchao.
    """

    use: Literal["adamw", "adamw_8bit"] = "adamw"
    lr: float = attrs.field(validator=at_least(0))
    betas: tuple[float, float] = attrs.field(default=(0.9, 0.999), validator=within(0, 1))
    eps: float = attrs.field(default=1e-8, validator=at_least(0))
    weight_decay: float = attrs.field(default=0.01, validator=at_least(0))
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = attrs.field(default=0, validator=at_least(0))
    decay_from: float = attrs.field(default=0.0, validator=_share)
    final: float = attrs.field(default=0.0, validator=_share)
    groups: tuple[OptimizerGroup, ...] = ()
