"""A kernel beside what the model computes now, both against float64."""

from __future__ import annotations

import torch
from elementwise_cases import CASES, Sizes, draw, place, results

ODD = Sizes(batch=2, frames=3, tokens_per_frame=13, heads=3, dim=12, hidden=300)
"""No power of two, no multiple of a tile."""


def check(name: str, dtype: torch.dtype, device: torch.device, *, sizes: Sizes = ODD, backend: str | None = None) -> None:
    """Results and gradients of the kernel are as close to float64 as the model's own in `dtype`, but for a quarter."""
    case = CASES[name]
    half, wide = case.make(sizes, device)
    given = ([x.to(dtype) for x in half], wide)  # what is rounded before any computation is no one's error
    shapes = [tuple(y.shape) for y in case.plain(*place(given, dtype, torch.float32))]
    upstream = [g.flip(1).to(dtype) for g in draw(device, *shapes)] if case.differentiable else []
    call = case.fused
    if backend:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend=backend)
    exact = results(case, case.plain, place(given, torch.float64, torch.float64), upstream)
    usual = results(case, case.plain, place(given, dtype, torch.float32), upstream)
    found = results(case, call, place(given, dtype, torch.float32), upstream)
    for index, (a, b, reference) in enumerate(zip(found, usual, exact, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), (name, index)
        error, bound = (((t.double() - reference).norm() / reference.norm()).item() for t in (a, b))
        assert error <= 1.25 * bound + 3e-7, (name, index, error, bound)
