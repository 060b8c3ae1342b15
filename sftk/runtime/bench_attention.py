"""`sftk bench attention`: every backend at a model's shapes, in TFLOP/s, with its error against float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import sftk
from sftk.functional.attention import UNMASKED, Backend, attention, attention_mask, available_backends
from sftk.functional.attention_spans import attention_by_spans, token_spans
from sftk.functional.meta_attention import BACKWARD_OP, FORWARD_OP, attention_flops
from sftk.runtime.attention_choice import SPANS
from sftk.runtime.attention_errors import Attend, reference, relative_errors
from sftk.runtime.attention_shapes import Heads, Shape
from sftk.runtime.bench_device import device_facts
from sftk.runtime.bench_measure import measure

QUEUED = 10
"""Calls that are timed together on a GPU, so that it never waits for the host."""
MOST_EXACT = 4096
"""Tokens of the shape at which errors are found; those of the real one's size have the same causes and take minutes."""
MOST_SCORES = 2**31
"""Bytes of scores from which `math`, which holds them all, is left out."""


def candidates(shape: Shape, heads: Heads, device: torch.device) -> dict[str, Attend]:
    """What can compute a shape on a device, by name: backends, and with a layout their calls over spans, too."""
    found: dict[str, Attend] = {}
    for backend in available_backends():
        scores = 4 * heads.batch * heads.heads * shape.queries * shape.keys
        if backend == "math" and scores > MOST_SCORES:
            continue
        if backend in UNMASKED and (device.type != "cuda" or heads.dtype.itemsize > 2):
            continue
        plain: Attend = functools.partial(_plain, backend=backend)
        if shape.layout is None:
            if backend != "flex":
                found[backend] = plain
            continue
        if backend == "flex" or (backend not in UNMASKED and scores <= MOST_SCORES):
            found[backend] = functools.partial(_masked, shape=shape, device=device, backend=backend)
        if backend != "flex":
            spans = token_spans(shape.layout, shape.tokens_per_frame)
            found[SPANS + backend] = functools.partial(attention_by_spans, spans=spans, attend=plain)
    return found


def _plain(q: Tensor, k: Tensor, v: Tensor, *, backend: Backend) -> Tensor:
    return attention(q, k, v, backend=backend)


def _masked(q: Tensor, k: Tensor, v: Tensor, *, shape: Shape, device: torch.device, backend: Backend) -> Tensor:
    mask = attention_mask(shape.layout, shape.tokens_per_frame, device, backend)
    return attention(q, k, v, mask=mask, backend=backend)


def bench_attention(
    heads: Heads,
    shapes: Sequence[Shape],
    device: torch.device,
    *,
    repeats: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures every candidate at every shape.

    Returns:
        The report: facts about the device, and a row for each shape and candidate, with `forward` and `training` (forward and
        backward) in seconds and TFLOP/s, and the relative errors of output and gradients. What fails leaves its error.

    Example:
        >>> heads = Heads(batch=1, heads=1, head_dim=8, dtype=torch.float32)
        >>> report = bench_attention(heads, [Shape(name="full", queries=8, keys=8)], torch.device("cpu"), repeats=1)
        >>> [row["backend"] for row in report["rows"]]
        ['sdpa', 'math']
    """
    report: dict[str, Any] = {"sftk": sftk.__version__, "device": device_facts(device)}
    report |= {"batch": heads.batch, "heads": heads.heads, "head_dim": heads.head_dim, "dtype": str(heads.dtype)}
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        say(shape.name)
        rows += _rows(heads, shape, device, repeats)
    return report | {"rows": rows}


def _rows(heads: Heads, shape: Shape, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and a cotangent."""
        counts = (shape.queries, shape.keys, shape.keys, shape.queries)
        drawn = (torch.randn(heads.batch, n, heads.heads, heads.head_dim, device=device, generator=generator) for n in counts)
        q, k, v, cotangent = (x.to(heads.dtype) for x in drawn)
        return q, k, v, cotangent

    small = shape.shrunk(MOST_EXACT)
    trial, real = draw(small), draw(shape)
    expected, on_trial = reference(*trial, small), candidates(small, heads, device)
    forward = attention_flops(FORWARD_OP, (*real[:3], shape.pairs)) / 1e12
    backward = attention_flops(BACKWARD_OP, (*real[:3], shape.pairs)) / 1e12
    for name, attend in candidates(shape, heads, device).items():
        row: dict[str, Any] = {"shape": shape.name, "queries": shape.queries, "keys": shape.keys, "backend": name}
        try:
            row["errors"] = relative_errors(on_trial[name], trial, expected)
            row |= _measured(attend, real, (forward, forward + backward), device, repeats)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        yield row


def _measured(
    attend: Attend, inputs: tuple[Tensor, ...], tflop: tuple[float, float], device: torch.device, repeats: int
) -> dict[str, Any]:
    *given, cotangent = inputs
    leaves = tuple(x.detach().clone().requires_grad_() for x in given)
    times = QUEUED if device.type == "cuda" else 1

    @torch.no_grad()
    def forward() -> None:
        for _ in range(times):
            attend(*leaves)

    def training() -> None:
        for _ in range(times):
            torch.autograd.grad(attend(*leaves), leaves, cotangent)

    row: dict[str, Any] = {}
    for name, call, work in zip(("forward", "training"), (forward, training), tflop, strict=True):
        measured = measure(call, device, repeats=repeats)
        seconds = measured.median / times
        row[name] = {
            "seconds": seconds,
            "low": min(measured.seconds) / times,
            "high": max(measured.seconds) / times,
            "tflops": work / seconds,
            "allocated": None if measured.allocated is None else measured.allocated - (measured.held or 0),
        }
    return row


def attention_lines(report: dict[str, Any]) -> Iterator[str]:
    """A report of attention as text."""
    device = report["device"]
    heads = f"batch {report['batch']}, {report['heads']} heads of {report['head_dim']}"
    yield f"{device['name']}; torch {device['torch']}; {heads}, {report['dtype'].removeprefix('torch.')}"
    yield _line("shape", "backend", "forward ms", "TFLOP/s", "training ms", "TFLOP/s", "error", "of gradients")
    for row in report["rows"]:
        if "error" in row:
            yield f"  {row['shape']:14}{row['backend']:20}  failed: {row['error']}"
            continue
        times = (f"{row[name][key] * scale:.4g}" for name in ("forward", "training") for key, scale in _SHOWN)
        errors = row["errors"]
        gradients = max(errors[name] for name in ("q", "k", "v"))
        yield _line(row["shape"], row["backend"], *times, f"{errors['out']:.1e}", f"{gradients:.1e}")


_SHOWN = (("seconds", 1e3), ("tflops", 1.0))


def _line(shape: str, backend: str, *cells: str) -> str:
    return f"  {shape:14}{backend:20}" + "".join(f"{cell:>13}" for cell in cells)
