"""Linear layers of Wan 2.1 1.3B in bf16 and as `lowp.training: fp8` computes them: products, rounding and whole passes as JSON.

    python benchmarks/fp8_linear.py > fp8_linear.json            # an H100 or H200; the table goes to stderr
    python benchmarks/fp8_linear.py --tokens 32760 --weights bf16
    python benchmarks/fp8_linear.py --tiny --device cpu          # small sizes and the reference, to try the script

Pieces: `bf16 forward` is `F.linear`; `fp8 forward` all that stands for it: rounding of tokens (`round tokens`), of the weight
(`round weight`; of its columns, for the input's gradient, `round weight's columns`) and the row-wise product (`fp8 product`).
`bf16 both` and `fp8 both` have a backward pass, too, for input, weight and bias. The weight is float32 as it is in training,
for which bf16 has a rounding of its own, of autocast (`cast weight`). Calls are replayed from a CUDA graph over copies of the
tokens, so the host counts for nothing; `host_microseconds` is what it needs. Errors are norms of differences to bf16 over its
norm, the worst of result and gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from elementwise import CACHED, seconds
from torch import Tensor

from sftk.functional.fp8_linear import fp8_product
from sftk.functional.fp8_rounding import by_columns, by_rows
from sftk.models.config import PRESETS
from sftk.models.fp8_training import fp8_training_linear
from sftk.runtime.device import device_name, pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Piece = Callable[[Tensor], Any]


def widths(tiny: bool) -> list[tuple[int, int]]:
    """In and out of a block's layers: attention, and both of the feed-forward layer."""
    config = PRESETS["1.3b"]
    dim, hidden = (64, 192) if tiny else (config.dim, config.ffn_dim)
    return [(dim, dim), (dim, hidden), (hidden, dim)]


def pieces(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Iterator[tuple[str, Piece, int]]:
    """Name, what takes the tokens, and floating-point operations of its products."""
    rows, columns, kind = by_rows(x), by_rows(weight), x.device.type
    flop = 2 * x.shape[0] * weight.numel()

    def bf16(x: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, cache_enabled=False):
            return F.linear(x, weight, bias)

    def fp8(x: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, cache_enabled=False):
            return fp8_training_linear(x, weight, bias)

    def both(call: Piece) -> Piece:
        return lambda x: torch.autograd.grad(call(leaf := x.detach().requires_grad_()), (leaf, weight, bias), grad)

    def forward(call: Piece) -> Piece:
        return torch.no_grad()(call)

    yield "bf16 forward", forward(bf16), flop
    yield "fp8 forward", forward(fp8), flop
    yield "bf16 both", both(bf16), 3 * flop
    yield "fp8 both", both(fp8), 3 * flop
    yield "fp8 product", forward(lambda x: fp8_product(rows, columns, bias)), flop
    yield "round tokens", forward(by_rows), 0
    yield "cast weight", forward(lambda x: weight.to(torch.bfloat16, copy=True)), 0
    yield "round weight", forward(lambda x: by_rows(weight)), 0
    yield "round weight's columns", forward(lambda x: by_columns(weight)), 0


def error(found: Any, reference: Any) -> float:
    pairs = zip(*((one,) if isinstance(one, Tensor) else one for one in (found, reference)), strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def measure_layer(tokens: int, sizes: tuple[int, int], dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict]:
    """A row for each piece."""
    read, returned = sizes
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, grad = draw(tokens, read).bfloat16(), draw(tokens, returned).bfloat16()
    weight, bias = (draw(returned, read) / read**0.5).to(dtype).requires_grad_(), draw(returned).to(dtype).requires_grad_()
    copies = [x.clone() for _ in range(max(1, CACHED // (x.numel() * 2)) if device.type == "cuda" else 1)]
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for name, piece, flop in pieces(x, weight, bias, grad):
        time, host = seconds([functools.partial(piece, one) for one in copies], device, repeats)
        row = {"tokens": tokens, "in": read, "out": returned, "piece": name, "flop": flop}
        row |= {"microseconds": time * 1e6, "host_microseconds": host * 1e6, "tflops": flop / time / 1e12}
        rest = name.partition(" ")[2]
        if rest in ("forward", "both"):
            results[name] = piece(x)
            row["error"] = error(results[name], results[f"bf16 {rest}"])
        rows.append(row)
        print(f"{tokens:6} {read:5} {returned:5}  {name:24} {time * 1e6:9.1f} us {row['tflops']:7.0f} TFLOP/s", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="numbers with commas; a clip's and a block's otherwise")
    parser.add_argument("--weights", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    device = pick_device(options.device)
    tokens = [int(one) for one in options.tokens.split(",")] if options.tokens else [48, 16] if options.tiny else [32760, 4680]
    layers = [(count, sizes) for count in tokens for sizes in widths(options.tiny)]
    rows = [row for layer in layers for row in measure_layer(*layer, DTYPES[options.weights], device, options.repeats)]
    told = {"device": device_name(device), "torch": torch.__version__, "weights": options.weights, "rows": rows}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
