"""Gradients of a rollout in bf16: however activations are kept, they differ by no more than two runs of the same kind do."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch

from sftk.core.graph import Graph
from sftk.core.replay import replayed
from sftk.functional.attention import available_backends
from sftk.functional.keys import Key
from sftk.models import WanConfig, WanModel
from sftk.runtime.activations import Checkpoint
from sftk.runtime.bench_cases import randomise_zeros
from sftk.runtime.parallelize import parallelize
from sftk.runtime.port import Port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, in_dim=16, out_dim=16, freq_dim=64, text_dim=32, text_len=8)


@pytest.mark.parametrize("backend", [b for b in ("sdpa_cudnn", "sdpa_flash", "flash") if b in available_backends()])
def test_every_kind_of_checkpoint_has_the_same_gradients(backend):
    torch.manual_seed(0)
    model = WanModel(CONFIG, backend).cuda()
    randomise_zeros(model)
    generator = torch.Generator().manual_seed(1)
    given = {
        "noise": torch.randn(1, 12, 16, 16, 16, generator=generator).cuda(),
        "prompt_embeds": torch.randn(1, 8, 32, generator=generator).cuda(),
        "key": Key(seed=1, samples=(0,)),
    }

    def gradients(checkpoint: str, replay: bool = False) -> torch.Tensor:
        module = parallelize(copy.deepcopy(model), checkpoint=checkpoint)
        graph, tape = Graph.from_spec("specs/rollout.yaml", steps=[1000, 500]), None
        if replay:
            graph, tape = replayed(graph)
        graph(given, {"denoiser": Port(module, torch.bfloat16)})["x0"].square().mean().backward()
        if tape is not None:
            tape.pull_back()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    runs = [gradients("none") for _ in range(4)]
    noise = max((run - runs[0]).norm() for run in runs)
    kinds = [{"checkpoint": kind} for kind in get_args(Checkpoint) if kind != "none"]
    for kind in (*kinds, {"checkpoint": "none", "replay": True}):
        assert (gradients(**kind) - runs[0]).norm() <= 2 * noise + 1e-6 * runs[0].norm(), kind
