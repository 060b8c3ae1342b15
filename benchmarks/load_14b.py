"""Writes a random checkpoint in the original Wan format and loads it in a process of its own: host peak and seconds, as JSON.

    python benchmarks/load_14b.py /scratch/wan-14b --device cuda
    python benchmarks/load_14b.py /scratch/wan-small --size 1.3b --layers 2

The first run writes the folder (28 GB in bf16 for the whole 14B); later ones load what is there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import attrs
import torch
from safetensors.torch import save_file

from sftk.models import WanConfig, WanModel, preset
from sftk.models.config_files import config_json
from sftk.models.export import SHARD_BYTES
from sftk.models.formats import open_weights
from sftk.models.weight_folders import STEM
from sftk.models.weights import DTYPES, build_model

CHUNK = 1 << 24
"""Random numbers that are drawn once and repeated: drawing 14 billion takes minutes."""


def write(folder: Path, config: WanConfig, dtype: torch.dtype, shard_bytes: int) -> None:
    """The folder, shard by shard."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in WanModel(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    folder.mkdir(parents=True)
    noise = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: filled_with(noise, shapes[name]) for name in names}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config_json(config, "original", folder), indent=2))


def filled_with(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor of that shape, of repeated noise."""
    tensor = torch.empty(shape, dtype=noise.dtype)
    for part in tensor.view(-1).split(CHUNK):
        part.copy_(noise[: len(part)])
    return tensor


def host_peak() -> int:
    """Bytes that this process (not its parent) had resident at most, pages of mapped files among them."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(folder: Path, device: str, dtype: str) -> dict[str, object]:
    """Loads the folder in this process and says what that took."""
    target = torch.device(device)
    if target.type == "cuda":
        torch.zeros(1, device=target)
    before = host_peak()
    start = time.perf_counter()
    source = open_weights(folder)
    model = build_model(source.config(), weights=folder, seed=0, dtype=dtype, backend="auto", device=target)
    if target.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = host_peak()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "file_bytes": source.bytes,
        "device": torch.cuda.get_device_name() if target.type == "cuda" else "cpu",
        "dtype": dtype,
        "seconds": round(seconds, 2),
        "gb_per_second": round(source.bytes / seconds / 1e9, 2),
        "host_peak_bytes": peak,
        "host_peak_before_bytes": before,
        "host_peak_over_file": round(peak / source.bytes, 3),
        "added_host_peak_over_file": round((peak - before) / source.bytes, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="14b", help="a named size")
    parser.add_argument("--layers", type=int, help="fewer layers than that size has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stored", default="bf16", choices=sorted(DTYPES), help="of the file")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16", "fp64"), help="of the loaded model")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9)
    parser.add_argument("--load-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_only:
        print(json.dumps(load(options.folder, options.device, options.dtype)))
        return
    if not options.folder.exists():
        config = preset(options.size)
        if options.layers is not None:
            config = attrs.evolve(config, num_layers=options.layers)
        start = time.perf_counter()
        write(options.folder, config, DTYPES[options.stored], round(options.shard_gb * 1e9))
        print(f"wrote {options.folder} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    command = [
        sys.executable,
        __file__,
        str(options.folder),
        "--device",
        options.device,
        "--dtype",
        options.dtype,
        "--load-only",
    ]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
