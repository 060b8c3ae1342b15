"""What a block does between its products, at Wan 2.1 1.3B's width: ways to write it, their time and bytes per second, as JSON.

    python benchmarks/elementwise.py > elementwise.json                  # an H100 or H200; the table goes to stderr
    python benchmarks/elementwise.py --only norm_rope --frames 21 --forms plain,tuned,halves
    python benchmarks/elementwise.py --forms triton,triton:warps=8,triton:rows=8:warps=2
    python benchmarks/elementwise.py --tiny                              # a tiny size on the CPU, to try the script

Forms: `plain` is the model's, compiled by Inductor; `halves` (of `norm_rope`) rotates even and odd channels apart; `tuned` and
`multi` are `plain` with Inductor's `coordinate_descent_tuning` and `triton.multi_kernel`; `eager` is not compiled; `triton` is
the kernel of sftk.models.kernels, with the tile's options after colons. `forward` keeps nothing; `both` is a pass with
gradients, its backward pass included. Calls are replayed from a CUDA graph, over copies of the inputs that no cache holds, so
the host counts for nothing; `host_microseconds` is what it needs for a call. Bytes are what must be read and written at
least; `of_copy` is their rate over that of copying a tensor. Errors are norms of differences to the model's form in float32
over its norm, the worst of all results and gradients.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from elementwise_cases import CASES, Case, Form, Sizes, place, results
from torch import Tensor

from sftk.models.config import PRESETS
from sftk.runtime.device import device_name, pick_device

DEFAULT_FORMS = "plain,halves,triton"
CACHED = 256 << 20
"""Bytes of inputs of which no device's cache holds much."""
OPTIONS: dict[str, dict[str, Any]] = {
    "tuned": {"coordinate_descent_tuning": True},
    "multi": {"triton.multi_kernel": 1},
}


def find_form(case: Case, name: str, device: torch.device) -> Form | None:
    """A form by its name; None where the piece has none of that name."""
    kind, *options = name.split(":")
    if kind == "triton":
        return functools.partial(case.fused, **{key: int(value) for key, value in (option.split("=") for option in options)})
    if kind == "eager":
        return case.plain
    plain = case.others.get(kind) if kind not in ("plain", *OPTIONS) else case.plain
    if plain is None or device.type != "cuda":
        return plain
    return torch.compile(plain, dynamic=False, fullgraph=True, options=OPTIONS.get(kind))


def size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def least_bytes(case: Case, inputs: list[Tensor], found: list[Tensor], upstream: list[Tensor]) -> int:
    """Forward: inputs read, outputs written. Backward: the inputs again, upstream gradients read, gradients written."""
    return size(inputs) + size(found) + (size(inputs) + size(upstream) if upstream else 0)


def seconds(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> tuple[float, float]:
    """Of one call on the device, and on the host alone: medians."""
    for call in (*calls, calls[0]):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            calls[0]()
            times.append(time.perf_counter() - began)
        return statistics.median(times), statistics.median(times)
    host = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        calls[0]()
        host.append(time.perf_counter() - began)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times), statistics.median(host)


def copy_rate(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of a copy larger than the caches."""
    source = torch.zeros(CACHED // 4 if device.type == "cuda" else 1 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * size([source]) / seconds([lambda: target.copy_(source)], device, repeats)[0]


def error(found: list[Tensor], reference: list[Tensor]) -> float:
    pairs = zip(found, reference, strict=True)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


def measure_form(case: Case, name: str, mode: str, sizes: Sizes, device: torch.device, repeats: int) -> dict[str, Any] | None:
    """One row; None where the piece has no such form."""
    form = find_form(case, name, device)
    if form is None:
        return None
    half, wide = case.make(sizes, device)
    half = [x.bfloat16() for x in half]
    inputs, exact = (place((half, wide), dtype, torch.float32) for dtype in (torch.bfloat16, torch.float32))
    upstream: list[Tensor] = []
    if mode == "both":
        upstream = [torch.randn_like(y) for y in case.plain(*inputs)]
    with torch.set_grad_enabled(bool(upstream)):
        began = time.perf_counter()
        found = results(case, form, inputs, upstream)
        first = time.perf_counter() - began
        wrong = error(found, results(case, case.plain, exact, upstream))
        least = least_bytes(case, inputs, found, upstream)
        del found, exact
        copies = max(1, math.ceil(CACHED / size(inputs))) if device.type == "cuda" else 1
        sets = [inputs, *([*(x.clone() for x in half), *wide] for _ in range(copies - 1))]
        calls = [functools.partial(results, case, form, each, upstream) for each in sets]
        taken, host = seconds(calls, device, repeats)
    return {
        "microseconds": 1e6 * taken,
        "host_microseconds": 1e6 * host,
        "least_bytes": least,
        "gb_per_second": least / taken / 1e9,
        "error": wrong,
        "first_call_seconds": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="pieces, with commas: " + ", ".join(CASES))
    parser.add_argument("--forms", default=DEFAULT_FORMS, help="with commas")
    parser.add_argument("--modes", default="forward,both", help="with commas")
    parser.add_argument("--frames", default="3,21", help="with commas")
    parser.add_argument("--tokens-per-frame", type=int, default=1560)
    parser.add_argument("--size", default="1.3b", choices=list(PRESETS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    device = pick_device("cpu" if given.tiny else given.device)
    config = PRESETS["digits" if given.tiny else given.size]
    rate = copy_rate(device, given.repeats)
    rows: list[dict[str, Any]] = []
    print(f"{device_name(device)}, copies at {rate / 1e9:.0f} GB/s", file=sys.stderr)
    print(
        f"{'piece':16}{'mode':9}{'tokens':>7}  {'form':24}{'us':>9}{'host us':>9}{'GB/s':>7}{'of copy':>8}  error",
        file=sys.stderr,
    )
    for name in given.only.split(",") if given.only else CASES:
        case = CASES[name]
        modes = [mode for mode in given.modes.split(",") if mode == "forward" or case.differentiable]
        for frames in map(int, given.frames.split(",")):
            tokens = 4 if given.tiny else given.tokens_per_frame
            sizes = Sizes(
                frames=frames, tokens_per_frame=tokens, heads=config.num_heads, dim=config.head_dim, hidden=config.ffn_dim
            )
            for mode, form in ((mode, form) for mode in modes for form in given.forms.split(",")):
                row: dict[str, Any] = {"piece": name, "mode": mode, "tokens": sizes.tokens, "form": form}
                try:
                    found = measure_form(case, form, mode, sizes, device, given.repeats)
                    if found is None:
                        continue
                    row |= found | {"of_copy": found["gb_per_second"] * 1e9 / rate}
                    numbers = (row[key] for key in ("microseconds", "host_microseconds", "gb_per_second", "of_copy"))
                    text = "{:9.1f}{:9.1f}{:7.0f}{:8.2f}".format(*numbers) + f"  {row['error']:.1e}"
                except Exception as problem:
                    row["problem"] = f"{type(problem).__name__}: {problem}"
                    text = "  " + row["problem"].splitlines()[0][:90]
                print(f"{name:16}{mode:9}{sizes.tokens:7}  {form:24}{text}", file=sys.stderr)
                rows.append(row)
                torch.compiler.reset()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    print(json.dumps({"device": device_name(device), "torch": torch.__version__, "copy_bytes_per_second": rate, "rows": rows}))


if __name__ == "__main__":
    main()
