"""Self-forcing toolkit: causal, few-step, streaming video diffusion students as graphs of pure functions."""

from sftk import functional as functional
from sftk import objectives as objectives
from sftk import spec as spec
from sftk.core import Fold, Graph, LatentShape, Transform, lookup, transform, transforms

__version__ = "0.1.0"

__all__ = ["Fold", "Graph", "LatentShape", "Transform", "lookup", "transform", "transforms"]
