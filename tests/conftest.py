"""Shared settings and builders: one thread, derandomised hypothesis, tiny models with random weights."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("sftk", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("sftk")


def pytest_collection_finish() -> None:
    """What the imports made stays to the end, so that no collection needs to look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(dtype, seed, **config)`: a tiny Wan model, every weight random (the head's, too)."""
    from sftk.models import WanConfig, WanModel

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, backend: Any = "auto", **changes: Any) -> WanModel:
        sizes: dict[str, Any] = {
            "dim": 24,
            "ffn_dim": 32,
            "num_heads": 2,
            "num_layers": 2,
            "in_dim": 4,
            "out_dim": 4,
            "freq_dim": 16,
            "text_dim": 8,
            "text_len": 4,
        }
        model = WanModel(WanConfig(**(sizes | changes)), backend=backend).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.1 if "norm" in name or name.endswith("bias") else parameter.shape[-1] ** -0.5
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale + ("norm" in name)
                )
        return model

    return make


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """`randn(*shape)`: standard normal float64 from a fixed seed."""
    generator = torch.Generator().manual_seed(1234)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def nothing_stays_registered():
    """Forgets what a test registers, by itself or through plugins."""
    from sftk.core.plugins import scope

    with scope():
        yield


STEM = "diffusion_pytorch_model"


def write_wan_folder(folder: Path, model: Any, *, shards: int = 1, **changes: Any) -> Path:
    """A folder as Wan publishes it: config.json, shards in the order of the names and their index."""
    from safetensors.torch import save_file

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


@pytest.fixture(scope="session")
def make_wan(make_model) -> Callable[..., Any]:
    """`make_wan(dtype, seed, **config)`: a tiny model of a size that the public formats can tell."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
        return make_model(dtype, seed, **({"text_len": 512} | changes))

    return make


WORDS = ["a", "fox", "runs", "over", "the", "snow", "red", "slowly", "&", "hare"]
SIZES = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 4}


def write_tokenizer(folder) -> None:
    """A unigram tokenizer of a few words in the files of google/umt5-xxl: it ends every prompt with </s>."""
    import tokenizers
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -2.0) for word in WORDS), ("▁", -5.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def random_module() -> torch.nn.Module:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.UMT5EncoderModel(transformers.UMT5Config(**SIZES)).requires_grad_(False).eval()
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5 + ("norm" in name))
    return module


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory) -> Path:
    """A text encoder as a Hugging Face pipeline folder `hf` and as Wan's folder `wan`, in bfloat16 as published."""
    pytest.importorskip("transformers")
    from sftk.models.text_keys import to_wan

    root = tmp_path_factory.mktemp("text")
    module = random_module().bfloat16()
    module.save_pretrained(root / "hf" / "text_encoder", max_shard_size="4KB")
    assert len(list((root / "hf" / "text_encoder").glob("model-*.safetensors"))) > 1
    write_tokenizer(root / "hf" / "tokenizer")
    write_tokenizer(root / "wan" / "google" / "umt5-xxl")
    weights = {name: tensor for name, tensor in module.state_dict().items() if name != "encoder.embed_tokens.weight"}
    torch.save(to_wan(weights), root / "wan" / "models_t5_umt5-xxl-enc-bf16.pth")
    return root


@pytest.fixture(scope="session")
def wan_download(tmp_path_factory, make_wan, wan_folder, text_folders) -> Path:
    """A tiny model in the files that `hf download Wan-AI/Wan2.1-T2V-1.3B` brings: transformer, text encoder, tokenizer, VAE."""
    diffusers = pytest.importorskip("diffusers")
    from sftk.models.vae_keys import to_wan

    folder = wan_folder(tmp_path_factory.mktemp("download") / "Wan2.1-T2V-1.3B", make_wan(in_dim=16, out_dim=16, text_dim=16))
    shutil.copytree(text_folders / "wan", folder, dirs_exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLWan(base_dim=4)
    torch.save(to_wan(vae.state_dict(), vae.config), folder / "Wan2.1_VAE.pth")
    return folder


@pytest.fixture
def wan_home(wan_download, tmp_path, monkeypatch) -> Path:
    """A working directory with that download, a recipe `mine.yaml` that reads it, and prompts."""
    shutil.copytree(wan_download, tmp_path / "wan_models" / wan_download.name)
    (tmp_path / "prompts.txt").write_text("a fox runs\na hare runs\n")
    (tmp_path / "mine.yaml").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MINE = """
version: 1
latents: {frames: 3, channels: 16, height: 4, width: 4}
data:
  use: prompts
  with: {path: prompts.txt, text: {use: umt5, with: {path: wan_models/Wan2.1-T2V-1.3B, text_dim: 16, device: cpu}}}
models:
  generator: {size: auto, weights: wan_models/Wan2.1-T2V-1.3B}
  real_score: {size: auto, weights: wan_models/Wan2.1-T2V-1.3B}
  fake_score: {size: auto, weights: wan_models/Wan2.1-T2V-1.3B}
optimizers: {generator: {lr: 1e-5}, fake_score: {lr: 1e-5}}
phases:
  - {name: generator, update: generator, graph: specs/dmd_generator.yaml, with: {steps: [1000, 500], shift: 5.0, guidance: 4.0}}
  - {name: critic, update: fake_score, graph: specs/score_critic.yaml, with: {steps: [1000, 500], shift: 5.0}}
train: {steps: 1}
batch: {global: 1}
sample:
  text: {use: umt5, with: {path: wan_models/Wan2.1-T2V-1.3B, text_dim: 16, device: cpu}}
  codec: {use: wan_vae, with: {path: wan_models/Wan2.1-T2V-1.3B, device: cpu}}
  roles:
    generator: {steps: [1000, 500], shift: 5.0}
    real_score: {method: bidirectional_ode, steps: 2, shift: 8.0, guidance: 6.0}
fetch: {wan_models/Wan2.1-T2V-1.3B: {repo: Wan-AI/Wan2.1-T2V-1.3B}}
device: cpu
"""
