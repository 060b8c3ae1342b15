"""Backbones, their sizes and their weights."""

from sftk.models.branch import BranchConfig, ClassifierBranch
from sftk.models.config import PRESETS, WanConfig, preset
from sftk.models.wan import WanModel

__all__ = ["PRESETS", "BranchConfig", "ClassifierBranch", "WanConfig", "WanModel", "preset"]
