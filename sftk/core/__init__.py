"""Transforms, graphs, the registry, states and geometry."""

from sftk.core.fold import Fold
from sftk.core.geometry import LatentShape, split_blocks
from sftk.core.graph import Graph
from sftk.core.registry import lookup, transforms
from sftk.core.replay import Tape, is_replayable, replayed
from sftk.core.state import from_state, to_state
from sftk.core.transform import FunctionTransform, Node, Transform, transform

__all__ = [
    "Fold",
    "FunctionTransform",
    "Graph",
    "LatentShape",
    "Node",
    "Tape",
    "Transform",
    "from_state",
    "is_replayable",
    "lookup",
    "replayed",
    "split_blocks",
    "to_state",
    "transform",
    "transforms",
]
