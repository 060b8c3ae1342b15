"""Objectives as functions; methods are graphs that share them."""

from sftk.objectives.consistency import consistency_loss
from sftk.objectives.denoising import denoising_error, denoising_loss, flow_matching_loss, squared_error
from sftk.objectives.divergence import divergence_weight, f_divergence, mean_log_ratio, weigh_samples
from sftk.objectives.dmd import dmd_gradient, mean_magnitude, per_sample_normalizer, surrogate_loss
from sftk.objectives.meanflow import adaptive_loss, consistency_target, mean_error, mean_flow_target, mix_velocity
from sftk.objectives.reward import Decoder, Reward, combine_losses, decode, reward_loss, score_reward

__all__ = [
    "Decoder",
    "Reward",
    "adaptive_loss",
    "combine_losses",
    "consistency_loss",
    "consistency_target",
    "decode",
    "denoising_error",
    "denoising_loss",
    "divergence_weight",
    "dmd_gradient",
    "f_divergence",
    "flow_matching_loss",
    "mean_error",
    "mean_flow_target",
    "mean_log_ratio",
    "mean_magnitude",
    "mix_velocity",
    "per_sample_normalizer",
    "reward_loss",
    "score_reward",
    "squared_error",
    "surrogate_loss",
    "weigh_samples",
]
