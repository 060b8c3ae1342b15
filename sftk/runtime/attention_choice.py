"""The fastest attention backends of a device, as measured: chosen from a report, stored, found again for `backend: auto`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from sftk.functional.attention import available_backends, set_auto
from sftk.runtime.device import device_name

CACHE_VARIABLE = "SFTK_CACHE"
"""Environment variable that names the folder of what is kept between runs."""
WORSE = 3.0
"""A backend is left out whose error is this much larger than the smallest at its shape; our choice."""
PASSES = ("forward", "training")


@attrs.frozen(kw_only=True)
class Choice:
    """The fastest backend of each shape, without gradient (`forward`) and with it (`training`).

    Args:
        device: as it names itself. torch: version.
        fastest: shape (`full`, `cached <blocks>`, `block_causal`, `cross`) to pass to backend; one that starts with `spans/`
            computes a layout in calls without a mask (`attention_by_spans`).
    """

    device: str
    torch: str
    fastest: dict[str, dict[str, str]]


def choose(report: Mapping[str, Any]) -> Choice:
    """The fastest backends of a report from `bench_attention`, among those that are exact enough.

    Example:
        >>> def row(backend, ms, error):
        ...     timed = {"seconds": ms / 1e3}
        ...     return {"shape": "full", "backend": backend, "forward": timed, "training": timed, "errors": {"out": error}}
        >>> rows = [row("sdpa", 3.0, 1e-3), row("quick", 1.0, 1e-2), row("sdpa_cudnn", 2.0, 2e-3)]
        >>> choose({"device": {"name": "d", "torch": "2"}, "rows": rows}).fastest
        {'full': {'forward': 'sdpa_cudnn', 'training': 'sdpa_cudnn'}}
    """
    fastest: dict[str, dict[str, str]] = {}
    measured = [row for row in report["rows"] if "error" not in row]
    for shape in dict.fromkeys(row["shape"] for row in measured):
        rows = [row for row in measured if row["shape"] == shape]
        best = min(_error(row) for row in rows)
        exact = [row for row in rows if _error(row) <= WORSE * best]
        fastest[shape] = {name: min(exact, key=lambda row: row[name]["seconds"])["backend"] for name in PASSES}
    return Choice(device=report["device"]["name"], torch=report["device"]["torch"], fastest=fastest)


def _error(row: Mapping[str, Any]) -> float:
    return max(row["errors"].values())


def choice_file(device: str, version: str) -> Path:
    """Where the choice for a device and a version of PyTorch is kept, in `$SFTK_CACHE`, else the user's cache folder.

    Example:
        >>> choice_file("NVIDIA H100 80GB HBM3", "2.11.0+cu130").name
        'NVIDIA-H100-80GB-HBM3_torch-2.11.0-cu130.json'
    """
    own = os.environ.get(CACHE_VARIABLE)
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sftk"
    name = "_torch-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word) for word in (device, version))
    return (Path(own) if own else users) / "attention" / f"{name}.json"


def save_choice(choice: Choice) -> Path:
    """Keeps a choice for later runs on its device; returns the file."""
    path = choice_file(choice.device, choice.torch)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(attrs.asdict(choice), indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def find_choice(device: torch.device) -> Choice | None:
    """What was measured on a device with this PyTorch, if anything; a file that cannot be read counts as nothing."""
    try:
        told = json.loads(choice_file(device_name(device), torch.__version__).read_text(encoding="utf-8"))
        return Choice(device=told["device"], torch=told["torch"], fastest=told["fastest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def use_choice(device: torch.device, backends: Iterable[str] | None = None) -> dict[str, str]:
    """Makes `backend: auto` take what was fastest on a device: for a pass over all frames, and for layouts.

    Args:
        backends: those that are there; by default `available_backends`.

    Returns:
        What `auto` takes from here on: `forward` and `training` without a mask, and `layouts`, see `set_auto`.
    """
    choice = find_choice(device) if device.type == "cuda" else None
    there = tuple(available_backends() if backends is None else backends)
    fastest = {} if choice is None else choice.fastest
    full, layouts = fastest.get("full", {}), fastest.get("block_causal", {})
    taken = {name: full[name] if full.get(name) in there else "sdpa" for name in PASSES}
    taken["layouts"] = "spans" if layouts.get("training", "").startswith("spans/") else "flex"
    set_auto(**taken)  # pyright: ignore[reportArgumentType]
    return taken
