"""FlashAttention 4 on the CPU: kernels of this file in the place of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sftk.functional import flash as module
from sftk.functional.split_kv import flash_partials


class Kernels:
    """What is called is in `calls`, by name, and what the last forward pass was given in `given`."""

    def __init__(self):
        self.calls, self.given = [], ()

    def forward(self, q, k, v, return_lse):
        self.calls.append("forward")
        self.given = (q, k, v)
        assert return_lse
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return out.contiguous(), scores.logsumexp(-1).float(), None, None, None

    def backward(self, q, k, v, out, grad, lse, *, dq, dk, dv):
        self.calls.append("backward")
        assert grad.is_contiguous()
        assert out.shape == q.shape
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        scale = q.shape[-1] ** -0.5
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale - lse[..., None]).exp()
        dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, grad))
        drawn = torch.einsum("bqhd,bkhd->bhqk", grad, v) - (grad * out).sum(-1).transpose(1, 2)[..., None]
        scores = weights * drawn * scale
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", scores, k))
        dk.copy_(torch.einsum("bhqk,bqhd->bkhd", scores, q))


@pytest.fixture
def kernels(monkeypatch):
    """The operators run on the CPU; what they are given there is gone afterwards."""
    found = Kernels()
    interface = SimpleNamespace(_flash_attn_fwd=found.forward, _flash_attn_bwd=found.backward)
    monkeypatch.setattr(module, "_interface", lambda: interface)
    for operator in (module.flash, module.flash_backward, flash_partials):
        operator.register_kernel("cpu", operator._init_fn)
    return found
