"""Shared settings and builders: one thread, derandomised hypothesis, tiny models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("sftk", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("sftk")


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
