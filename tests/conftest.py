"""Shared settings and builders: one thread, derandomised hypothesis, tiny models with random weights."""

from __future__ import annotations

import gc
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
def temporary_transforms():
    """Forgets the transforms that a test registers."""
    from sftk.core import registry

    before = set(registry.transforms())
    yield
    for name in set(registry.transforms()) - before:
        registry.unregister(name)


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
