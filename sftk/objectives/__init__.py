"""Objectives as functions; methods are graphs that share them."""

from sftk.objectives.consistency import consistency_loss
from sftk.objectives.denoising import denoising_error, denoising_loss, flow_matching_loss, squared_error
from sftk.objectives.divergence import divergence_weight, f_divergence, mean_log_ratio, weigh_samples
from sftk.objectives.dmd import dmd_gradient, mean_magnitude, per_sample_normalizer, surrogate_loss
from sftk.objectives.gan import gan_discriminator_loss, gan_generator_loss
from sftk.objectives.meanflow import adaptive_loss, consistency_target, mean_error, mean_flow_target, mix_velocity
from sftk.objectives.penalty import finite_difference, gradient_penalty
from sftk.objectives.reward import Decoder, Reward, combine_losses, decode, reward_loss, score_reward
from sftk.objectives.sid import sid_loss

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
    "finite_difference",
    "flow_matching_loss",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "gradient_penalty",
    "mean_error",
    "mean_flow_target",
    "mean_log_ratio",
    "mean_magnitude",
    "mix_velocity",
    "per_sample_normalizer",
    "reward_loss",
    "score_reward",
    "sid_loss",
    "squared_error",
    "surrogate_loss",
    "weigh_samples",
]
