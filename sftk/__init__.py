"""Self-forcing toolkit: causal, few-step, streaming video diffusion students as graphs of pure functions."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftk import functional as functional
    from sftk import objectives as objectives
    from sftk import spec as spec
    from sftk.core import Fold, Graph, LatentShape, Transform, lookup, transform, transforms

__version__ = "0.1.0"

__all__ = ["Fold", "Graph", "LatentShape", "Transform", "lookup", "transform", "transforms"]

_PACKAGES = ("functional", "objectives", "spec")


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for, so that `sftk --help` does without torch (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f"sftk.{name}")
    if name in __all__:
        return getattr(import_module("sftk.core"), name)
    raise AttributeError(f"module 'sftk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
