"""Names and sizes of the text encoder in Wan's `models_t5_umt5-xxl-enc-bf16.pth` and in transformers' `UMT5EncoderModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sftk.errors import CheckpointError

_ATTENTION, _FEED_FORWARD = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
RULES = (
    ("token_embedding.weight", "shared.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
    ("blocks.{}.norm1.weight", f"{_ATTENTION}.layer_norm.weight"),
    *((f"blocks.{{}}.attn.{part}.weight", f"{_ATTENTION}.SelfAttention.{part}.weight") for part in "qkvo"),
    # Every layer has relative position buckets of its own, unlike T5, where the first layer's serve all.
    ("blocks.{}.pos_embedding.embedding.weight", f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight"),
    ("blocks.{}.norm2.weight", f"{_FEED_FORWARD}.layer_norm.weight"),
    ("blocks.{}.ffn.gate.0.weight", f"{_FEED_FORWARD}.DenseReluDense.wi_0.weight"),
    ("blocks.{}.ffn.fc1.weight", f"{_FEED_FORWARD}.DenseReluDense.wi_1.weight"),
    ("blocks.{}.ffn.fc2.weight", f"{_FEED_FORWARD}.DenseReluDense.wo.weight"),
)
"""Wan's name and transformers' name of every tensor; {} is the layer."""

_LAYER = re.compile(r"(?<=blocks\.)\d+|(?<=encoder\.block\.)\d+")


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Wan's file under transformers' names. Names that fit no rule stay.

    Example:
        >>> import torch
        >>> list(to_transformers({"blocks.7.ffn.gate.0.weight": torch.zeros(1)}))
        ['encoder.block.7.layer.1.DenseReluDense.wi_0.weight']
    """
    return _renamed(weights, dict(RULES))


def to_wan(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_transformers`.

    Example:
        >>> import torch
        >>> list(to_wan({"encoder.block.7.layer.1.DenseReluDense.wi_0.weight": torch.zeros(1)}))
        ['blocks.7.ffn.gate.0.weight']
    """
    return _renamed(weights, {name: wan for wan, name in RULES})


def encoder_config(weights: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The fields of transformers' `UMT5Config`, read from the shapes in Wan's file.

    Args:
        where: the file, for errors.

    Raises:
        CheckpointError: it holds no such encoder.
    """
    first = "blocks.0."
    needed = (
        "token_embedding.weight",
        f"{first}attn.q.weight",
        f"{first}ffn.fc1.weight",
        f"{first}pos_embedding.embedding.weight",
    )
    for name in needed:
        if name not in weights:
            raise CheckpointError(
                f"{where} is no text encoder of Wan: it lacks {name}; expected models_t5_umt5-xxl-enc-bf16.pth"
            )
    (vocabulary, width), (inner, _), (ffn, _), (buckets, heads) = (weights[name].shape for name in needed)
    layers = {int(found.group()) for name in weights if (found := _LAYER.search(name))}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": ffn,
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _renamed(weights: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer = _LAYER.search(name)
        pattern = rules.get(_LAYER.sub("{}", name, count=1))
        renamed[name if pattern is None else pattern.format(layer.group() if layer else "")] = tensor
    return renamed
