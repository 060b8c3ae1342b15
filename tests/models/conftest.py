"""Weights in the public formats, written here by hand from what those formats are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from sftk.models import WanModel

STEM = "diffusion_pytorch_model"


def write_wan_folder(folder: Path, model: WanModel, *, shards: int = 1, **changes: Any) -> Path:
    """A folder as Wan publishes it: config.json, shards in the order of the names and their index."""
    config = model.config
    values = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"}
    for key in ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len"):
        values[key] = getattr(config, key)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values | changes))
    weights = {name: tensor.contiguous() for name, tensor in sorted(model.state_dict().items())}
    if shards == 1:
        save_file(weights, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
        return folder
    names, where = list(weights), {}
    for number in range(shards):
        file = f"{STEM}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def wan_folder() -> Callable[..., Path]:
    """`wan_folder(path, model, shards=1, **config_changes)`."""
    return write_wan_folder


@pytest.fixture
def make_wan(make_model) -> Callable[..., WanModel]:
    """`make_wan(dtype, seed, **config)`: a tiny model of a size that the public formats can tell."""
    import torch

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> WanModel:
        return make_model(dtype, seed, **({"text_len": 512} | changes))

    return make
