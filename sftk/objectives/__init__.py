"""Objectives as functions; methods are graphs that share them."""

from sftk.objectives.denoising import denoising_error, denoising_loss, flow_matching_loss, squared_error
from sftk.objectives.dmd import dmd_gradient, mean_magnitude, per_sample_normalizer, surrogate_loss

__all__ = [
    "denoising_error",
    "denoising_loss",
    "dmd_gradient",
    "flow_matching_loss",
    "mean_magnitude",
    "per_sample_normalizer",
    "squared_error",
    "surrogate_loss",
]
