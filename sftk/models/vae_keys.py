"""Names and sizes of Wan's own VAE files (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`) and of diffusers' `AutoencoderKLWan`.

Both versions have the same parts. 2.1 numbers the layers of all stages in one sequence; 2.2, whose stages have a residual path
of their own, numbers stages and the layers in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sftk.errors import CheckpointError

STATISTICS = {
    # Wan 2.1, wan/modules/vae.py
    16: (
        "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 "
        "-0.2921",
        "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160",
    ),
    # Wan 2.2 TI2V-5B, wan/modules/vae2_2.py
    48: (
        "-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098 0.0375 "
        "-0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 "
        "-0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 "
        "-0.0548 -0.1681 -0.0667",
        "0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978 "
        "0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 "
        "0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744",
    ),
}
"""Mean and standard deviation of the latents by their number of channels: Wan's own files do not hold them."""

_PARTS = (
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
    *(
        (f"{side}.{wan}.", f"{side}.{diffusers}.")
        for side in ("encoder", "decoder")
        for wan, diffusers in (
            ("conv1", "conv_in"),
            ("middle.0", "mid_block.resnets.0"),
            ("middle.1", "mid_block.attentions.0"),
            ("middle.2", "mid_block.resnets.1"),
            ("head.0", "norm_out"),
            ("head.2", "conv_out"),
        )
    ),
)
_IN_RESIDUAL_BLOCK = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)
_NESTED = "encoder.downsamples.0.downsamples.0.residual.2.weight"


def vae_rules(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Prefixes of Wan's names and of diffusers', for every part of a VAE.

    Args:
        config: of `AutoencoderKLWan`.

    Example:
        >>> rules = vae_rules({"dim_mult": [1, 2], "num_res_blocks": 1, "is_residual": False})
        >>> [rule for rule in rules if "decoder.upsamples." in rule[0]][2:4]
        [('decoder.upsamples.2.', 'decoder.up_blocks.0.upsamplers.0.'),
         ('decoder.upsamples.3.', 'decoder.up_blocks.1.resnets.0.')]
    """
    stages, blocks, nested = len(config["dim_mult"]), config["num_res_blocks"], config["is_residual"]
    rules = list(_PARTS)
    for side, way, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        for stage in range(stages):
            for layer in range(count + (stage < stages - 1)):
                flat = stage * (count + 1) + layer
                place = f"{stage}.{way}samples.{layer}" if nested else f"{flat}"
                part = f"resnets.{layer}" if layer < count else f"{way}sampler" if nested else f"{way}samplers.0"
                # Without nesting diffusers numbers the encoder's layers in one sequence, too.
                name = f"{flat}" if side == "encoder" and not nested else f"{stage}.{part}"
                rules.append((f"{side}.{way}samples.{place}.", f"{side}.{way}_blocks.{name}."))
    return tuple(rules)


def to_diffusers(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a Wan file under diffusers' names. Names that fit no rule stay.

    Example:
        >>> import torch
        >>> config = {"dim_mult": [1], "num_res_blocks": 1, "is_residual": False}
        >>> list(to_diffusers({"decoder.upsamples.1.residual.6.bias": torch.zeros(1)}, config))
        ['decoder.up_blocks.0.resnets.1.conv2.bias']
    """
    rules = vae_rules(config)
    return {_rename(name, rules, _IN_RESIDUAL_BLOCK): tensor for name, tensor in weights.items()}


def to_wan(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`.

    Example:
        >>> import torch
        >>> config = {"dim_mult": [1], "num_res_blocks": 1, "is_residual": False}
        >>> list(to_wan({"decoder.up_blocks.0.resnets.1.conv2.bias": torch.zeros(1)}, config))
        ['decoder.upsamples.1.residual.6.bias']
    """
    rules = tuple((right, left) for left, right in vae_rules(config))
    inner = tuple((right, left) for left, right in _IN_RESIDUAL_BLOCK)
    return {_rename(name, rules, inner): tensor for name, tensor in weights.items()}


def vae_config(weights: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The config of `AutoencoderKLWan`, read from the shapes in a Wan file.

    Args:
        where: the file, for errors.

    Raises:
        CheckpointError: it is no Wan VAE, or of another number of latent channels than Wan's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in ("encoder.conv1.weight", "conv2.weight", "decoder.head.2.weight"):
        if name not in shapes:
            raise CheckpointError(f"{where} is no Wan VAE: it lacks {name}; expected Wan2.1_VAE.pth or Wan2.2_VAE.pth")
    channels, pixels, width = shapes["conv2.weight"][0], shapes["encoder.conv1.weight"][1], shapes["encoder.conv1.weight"][0]
    if channels not in STATISTICS:
        raise CheckpointError(f"{where} has {channels} latent channels, whose mean and std are not known; expected 16 or 48")
    stages = _stages(shapes, nested=_NESTED in shapes)
    patch = math.isqrt(pixels // 3)
    mean, std = ([float(number) for number in text.split()] for text in STATISTICS[channels])
    temporal = [stage["temporal"] for stage in stages[:-1]]
    return {
        "base_dim": width,
        "decoder_base_dim": shapes["decoder.head.2.weight"][1],
        "z_dim": channels,
        "dim_mult": [stage["width"] // width for stage in stages],
        "num_res_blocks": stages[0]["blocks"],
        "temperal_downsample": temporal,
        "latents_mean": mean,
        "latents_std": std,
        "is_residual": _NESTED in shapes,
        "in_channels": pixels,
        "out_channels": shapes["decoder.head.2.weight"][0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** len(temporal) * patch,
    }


def _stages(shapes: Mapping[str, tuple[int, ...]], *, nested: bool) -> list[dict[str, Any]]:
    """Width, residual blocks and temporal stride of the encoder's stages; a resampling layer ends each but the last."""
    stages: list[dict[str, Any]] = [{"width": 0, "blocks": 0, "temporal": False}]
    stage = layer = 0
    while True:
        place = f"encoder.downsamples.{stage}.downsamples.{layer}" if nested else f"encoder.downsamples.{layer}"
        if f"{place}.residual.2.weight" in shapes:
            stages[-1]["width"] = shapes[f"{place}.residual.2.weight"][0]
            stages[-1]["blocks"] += 1
            layer += 1
        elif f"{place}.resample.1.weight" in shapes:
            stages[-1]["temporal"] = f"{place}.time_conv.weight" in shapes
            stages.append({"width": 0, "blocks": 0, "temporal": False})
            stage, layer = stage + 1, 0 if nested else layer + 1
        else:
            return stages


def _rename(name: str, rules: tuple[tuple[str, str], ...], inner: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        if name.startswith(old):
            rest = name.removeprefix(old)
            for old_part, new_part in inner:
                if rest.startswith(old_part):
                    return new + new_part + rest.removeprefix(old_part)
            return new + rest
    return name
