"""Compiles the attention kernel for Hopper without a GPU, and prints what the assembler says of it. Run by a test."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sftk.functional.fp8_attention import TILE


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiled:
    """Stands for a kernel, and compiles it where it would be launched."""

    def __init__(self, kernel: Any):
        self.kernel, self.result = kernel, None

    def __getitem__(self, grid: Any) -> Any:
        def compile(*args: Any, **options: Any) -> None:
            self.result = self.kernel.warmup(*args, grid=(1,), **options)

        return compile


def main(dim: int) -> None:
    import triton  # where this is run: a suite without it imports the file, too
    from triton.backends.nvidia.compiler import get_ptxas

    from sftk.functional.kernels import fp8_attention_hopper as hopper

    triton.runtime.driver.set_active(Driver())
    hopper._attend = Compiled(hopper._attend)
    (batch, queries, heads, tiles), codes = (2, 200, 3, 5), torch.float8_e4m3fn
    hopper.run(
        torch.empty(batch, queries, heads, dim, dtype=codes),
        torch.empty(batch, heads, queries),
        torch.empty(batch, tiles * TILE, heads, dim, dtype=codes),
        torch.empty(batch, heads, dim, tiles * TILE, dtype=codes),
        torch.empty(batch, heads, tiles),
        torch.empty(batch, heads, tiles),
        torch.empty(2, batch, queries, heads, dim, dtype=torch.bfloat16),
        torch.empty(2, batch, heads, queries),
        tiles * TILE - 28,
        3,
    )
    assembler = get_ptxas(90).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(hopper._attend.result.asm["ptx"])
        command = [assembler, "-v", "--gpu-name=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stderr)
        sys.exit(done.returncode)


if __name__ == "__main__":
    main(int(sys.argv[1]))
