"""What a recipe says about low precision: `lowp`, and `lowp` of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.functional.packed import Storage

if TYPE_CHECKING:
    from sftk.spec.schema import Recipe

Products = Literal["full", "fp8"]


@attrs.frozen(kw_only=True)
class LowpSection:
    """What computes or is kept with 8 bits. Unlike `precision`, it changes results by more than rounding to bf16 does.

    Args:
        linears: linear layers of the backbones' blocks in calls without gradient: the steps and commits of a rollout, scores,
            samples. A model may say otherwise for itself, see `ModelLowp`.
        training: these layers in calls with gradient: their product and the gradient of their input. The gradients of their
            weights are computed as they were.
        attention: self-attention of the backbones in calls without gradient and without a mask: both of its products. With
            `training`, too, the forward pass of calls with gradient over many tokens.
        kv_cache: what the phases' parameter `kv_cache` is where they do not bind it.
    """

    linears: Products = "full"
    training: Products = "full"
    attention: Products = "full"
    kv_cache: Storage = "full"

    @property
    def defaults(self) -> dict[str, Any]:
        """Values that take the place of specs' own defaults.

        Example:
            >>> LowpSection(kv_cache="int8").defaults, LowpSection().defaults
            ({'kv_cache': 'int8'}, {})
        """
        return {} if self.kv_cache == "full" else {"kv_cache": self.kv_cache}

    @property
    def fp8(self) -> tuple[str, ...]:
        """Which of the keys ask for products in fp8.

        Example:
            >>> LowpSection(training="fp8", attention="fp8").fp8
            ('training', 'attention')
        """
        return tuple(key for key in ("linears", "training", "attention") if getattr(self, key) == "fp8")

    @property
    def fp8_layers(self) -> bool:
        """Whether linear layers are to compute in fp8.

        Example:
            >>> LowpSection(attention="fp8").fp8_layers, LowpSection(training="fp8").fp8_layers
            (False, True)
        """
        return "fp8" in (self.linears, self.training)


def gradient_roles(graph: Graph | Fold) -> set[str]:
    """Roles that a graph may call with gradient: those of its nodes but where `grad: false` stands.

    Example:
        >>> sorted(gradient_roles(Graph.from_spec("specs/dmd_generator.yaml")))
        ['generator']
        >>> sorted(gradient_roles(Graph.from_spec("specs/sid_generator.yaml")))
        ['fake_score', 'generator', 'real_score']
    """
    found: set[str] = set()
    for node in graph.nodes:
        if node.grad:
            inner = gradient_roles(node.op) if isinstance(node.op, Graph | Fold) else set(node.op.ports)
            found |= {role for port, role in node.roles if port in inner}
    return found


@attrs.frozen(kw_only=True)
class ModelLowp:
    """What one model does otherwise than the recipe's `lowp`; null takes what that says.

    Args:
        linears, training, attention: see `LowpSection`.
    """

    linears: Products | None = None
    training: Products | None = None
    attention: Products | None = None

    def over(self, section: LowpSection) -> LowpSection:
        """What holds for the model.

        Example:
            >>> section = LowpSection(linears="fp8", training="fp8")
            >>> ModelLowp(linears="full").over(section).fp8, ModelLowp().over(section).fp8
            (('training',), ('linears', 'training'))
        """
        own = {key: value for key, value in attrs.asdict(self).items() if value is not None}
        return attrs.evolve(section, **own)


def holds_half(recipe: Recipe, role: str) -> bool:
    """Whether a role's blocks keep their weights in bfloat16 besides float32, where they are not sharded.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> recipe = load_recipe("recipes/wan-1.3b/dmd.yaml")[0].recipe
        >>> [role for role in recipe.models if holds_half(recipe, role)]
        ['generator']
    """
    section = recipe.models[role]
    fp8 = section.size is not None and section.lowp.over(recipe.lowp).linears == "fp8"
    return section.half_copy and section.dtype == "fp32" and recipe.precision == "bf16" and not fp8
