"""A backbone's size as checkpoints tell it: in `config.json`, and in the shapes of the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from sftk.errors import CheckpointError
from sftk.models.config import HEAD_DIM, WanConfig, preset

CLASSES = {"WanModel": "original", "CausalWanModel": "original", "WanTransformer3DModel": "diffusers"}
"""`_class_name` in config.json to the naming of the parameters."""

_RENAMED = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}
_DIFFUSERS_NORMS: dict[Any, bool] = {"rms_norm_across_heads": True, None: False}
_SAME = ("ffn_dim", "num_layers", "text_dim", "freq_dim", "cross_attn_norm", "eps")
_BARE = {"head.modulation", "patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "head.head.weight"}
_FOREIGN = {
    "img_emb.": "an image-to-video Wan",
    "condition_embedder.image_embedder.": "an image-to-video Wan",
    "vace_": "a VACE model",
    "down_blocks.": "a U-Net, such as Stable Diffusion's",
    "input_blocks.": "a U-Net, such as Stable Diffusion's",
    "diffusion_model.input_blocks.": "a U-Net, such as Stable Diffusion's",
    "decoder.": "a VAE",
    "encoder.": "a VAE or a text encoder",
    "token_embedding.": "a text encoder",
    "shared.": "a text encoder",
}
_FIX = "name the transformer of a Wan 2.1 text-to-video model or of Wan 2.2 TI2V"


def check_architecture(names: Iterable[str], path: Path) -> None:
    """That parameters of these names (original ones) are a text-to-video Wan transformer's.

    Raises:
        CheckpointError: they are not; the message names a key and what it is a sign of.
    """
    names = list(names)
    for prefix, what in _FOREIGN.items():
        sign = next((name for name in names if name.startswith(prefix)), None)
        if sign is not None:
            raise CheckpointError(f"{path} holds {sign}, a key of {what}; {_FIX}")
    sign = next((name for name in names if ".k_img." in name or ".add_k_proj." in name), None)
    if sign is not None:
        raise CheckpointError(f"{path} holds {sign}, a key of an image-to-video Wan; {_FIX}")
    if not any(re.fullmatch(r"blocks\.\d+\.self_attn\..+", name) for name in names):
        shown = ", ".join(names[:4]) or "nothing"
        raise CheckpointError(f"{path} is no Wan transformer: it has no blocks.0.self_attn, but {shown}; {_FIX}")


def told_by_json(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of a `WanConfig` that an original or diffusers' config.json gives.

    Args:
        values: what the file says.
        path: of the file, for messages.

    Raises:
        CheckpointError: it is of another model.

    Example:
        >>> told_by_json({"_class_name": "WanModel", "model_type": "t2v", "dim": 1536, "num_heads": 12}, Path("config.json"))
        {'dim': 1536, 'num_heads': 12}
    """
    name = values.get("_class_name")
    if name not in CLASSES:
        raise CheckpointError(
            f"{path} says _class_name: {name!r}, another architecture; expected {' or '.join(sorted(CLASSES))}: {_FIX}"
        )
    if CLASSES[name] == "original":
        kind = values.get("model_type", "t2v")
        if kind not in ("t2v", "ti2v"):
            raise CheckpointError(f"{path} says model_type: {kind!r}; expected t2v or ti2v: {_FIX}")
        fields = {field.name for field in attrs.fields(WanConfig)} - {"rope_base", "rope_base_time", "interval_embedding"}
        found = {key: value for key, value in values.items() if key in fields}
    else:
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if values.get(key) is not None:
                raise CheckpointError(f"{path} says {key}: {values[key]}, an image-to-video Wan; {_FIX}")
        found = {new: values[old] for old, new in _RENAMED.items() if values.get(old) is not None}
        found |= {key: values[key] for key in (*_SAME, "patch_size") if key in values}
        if "num_heads" in found and "attention_head_dim" in values:
            found["dim"] = found["num_heads"] * values["attention_head_dim"]
        norm = values.get("qk_norm", "rms_norm_across_heads")
        if norm not in _DIFFUSERS_NORMS:
            raise CheckpointError(f"{path} says qk_norm: {norm!r}; expected rms_norm_across_heads or null")
        found["qk_norm"] = _DIFFUSERS_NORMS[norm]
    if "patch_size" in found:
        found["patch_size"] = tuple(found["patch_size"])
    return found


def told_by_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """Fields of a `WanConfig` that the tensors' shapes give (under original names): all but the number of heads.

    Raises:
        CheckpointError: a tensor that tells one is missing.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> shapes = {name: tuple(tensor.shape) for name, tensor in WanModel(preset("digits")).state_dict().items()}
        >>> found = told_by_shapes(shapes, Path("digits"))
        >>> found["dim"], found["num_layers"], found["in_dim"], found["patch_size"]
        (96, 4, 4, (1, 2, 2))
    """
    missing = sorted({*_BARE, "blocks.0.ffn.0.weight"} - set(shapes))
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]}, which tells the model's size; the checkpoint is not whole")
    dim, in_dim, *patch = shapes["patch_embedding.weight"]
    rows = 1
    for size in patch:
        rows *= size
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    return {
        "dim": dim,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": max(layers) + 1,
        "in_dim": in_dim,
        "out_dim": shapes["head.head.weight"][0] // rows,
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "patch_size": tuple(patch),
        "qk_norm": "blocks.0.self_attn.norm_q.weight" in shapes,
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
    }


def geometry(shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any] | None, path: Path, json_path: Path) -> WanConfig:
    """The size that a checkpoint's config.json and its tensors tell together.

    Without a config.json, heads are taken to be as wide as in every published Wan (`HEAD_DIM`).

    Args:
        shapes: of the tensors, under original names.
        values: of the config.json at `json_path`, or None.

    Raises:
        CheckpointError: they disagree, or do not tell it.
    """
    seen = told_by_shapes(shapes, path)
    told = told_by_json(values, json_path) if values is not None else {}
    for key, value in seen.items():
        if key in told and told[key] != value:
            raise CheckpointError(
                f"{json_path} says {key}: {told[key]}, but the tensors beside it have {value}; they are of different models"
            )
    if "num_heads" not in told:
        if seen["dim"] % HEAD_DIM:
            raise CheckpointError(
                f"{path} does not tell the number of heads (width {seen['dim']}); write the model's `size` out"
            )
        told["num_heads"] = seen["dim"] // HEAD_DIM
    try:
        return WanConfig(**(told | seen))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{json_path}: {error}") from error


def config_json(config: WanConfig, naming: str, path: Path) -> dict[str, Any]:
    """What the config.json of an exported model says.

    Args:
        naming: `original` or `diffusers`.
        path: where it goes, for messages.

    Raises:
        CheckpointError: that format cannot express the model.

    Example:
        >>> from sftk.models import preset
        >>> config_json(preset("1.3b"), "diffusers", Path("out"))["num_attention_heads"]
        12
    """
    plain = attrs.evolve(config, interval_embedding=False, rope_base=10000.0, rope_base_time=10000.0)
    if plain != config:
        what = "interval_embedding" if config.interval_embedding else f"rope_base {config.rope_base:g}"
        raise CheckpointError(f"cannot write {path}: the {naming} format has no place for {what}; take --format sftk")
    if naming == "original":
        keys = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
        kind = {"_class_name": "WanModel", "model_type": "ti2v" if config.in_dim == preset("5b").in_dim else "t2v"}
        return kind | {key: getattr(config, key) for key in keys}
    shared = {key: getattr(config, key) for key in _SAME}
    renamed = {old: getattr(config, new) for old, new in _RENAMED.items()}
    return {
        "_class_name": "WanTransformer3DModel",
        **shared,
        **renamed,
        "attention_head_dim": config.head_dim,
        "patch_size": list(config.patch_size),
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "added_kv_proj_dim": None,
        "image_dim": None,
        "rope_max_seq_len": 1024,
    }
