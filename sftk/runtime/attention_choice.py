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

from sftk.functional.attention import UNMASKED, WITHOUT_GRADIENT, available_backends, set_auto
from sftk.runtime.device import device_name

CACHE_VARIABLE = "SFTK_CACHE"
"""Environment variable that names the folder of what is kept between runs."""
WORSE = 3.0
"""A backend is left out whose error is this much larger than the smallest at its shape; our choice."""
CLOSE = 1.05
"""A backend counts as fast as the fastest up to this ratio; our choice, a little more than repeats differ."""
PASSES = ("forward", "training")
LAYOUT = "block_causal"
"""The shape that has a layout."""
SPANS = "spans/"
"""In front of a backend's name: a layout as its calls without a mask."""


@attrs.frozen(kw_only=True)
class Choice:
    """The fastest backend of each shape, without gradient (`forward`) and with it (`training`).

    Args:
        device: as it names itself. torch: version.
        fastest: shape (a name from `model_shapes`) to pass to backend; one that starts with `spans/`
            computes a layout in calls without a mask (`attention_by_spans`).
        queries, keys: shape to its number of them.
    """

    device: str
    torch: str
    fastest: dict[str, dict[str, str]]
    queries: dict[str, int]
    keys: dict[str, int]


def choose(report: Mapping[str, Any]) -> Choice:
    """The fastest backends of a report from `bench_attention`, among those that are exact enough.

    Example:
        >>> def row(backend, ms, error):
        ...     timed = {"seconds": ms / 1e3}
        ...     of = {"shape": "full", "queries": 9, "keys": 9, "backend": backend, "errors": {"out": error}}
        ...     return {**of, "forward": timed, "training": timed}
        >>> rows = [row("sdpa", 3.0, 1e-3), row("quick", 1.0, 1e-2), row("sdpa_cudnn", 2.0, 2e-3)]
        >>> choose({"device": {"name": "d", "torch": "2"}, "rows": rows}).fastest
        {'full': {'forward': 'sdpa_cudnn', 'training': 'sdpa_cudnn'}}
    """
    fastest: dict[str, dict[str, str]] = {}
    favourites: dict[str, str] = {}
    measured = [row for row in report["rows"] if "error" not in row]
    for shape in dict.fromkeys(row["shape"] for row in measured):
        rows = [row for row in measured if row["shape"] == shape]
        best = min(_error(row) for row in rows)
        exact = [row for row in rows if _error(row) <= WORSE * best]
        fastest[shape] = {name: _fastest(exact, name, favourites.get(name)) for name in PASSES}
        favourites = favourites or fastest[shape]
    counts = {name: {row["shape"]: row[name] for row in measured} for name in ("queries", "keys")}
    return Choice(device=report["device"]["name"], torch=report["device"]["torch"], fastest=fastest, **counts)


def _fastest(rows: list[Mapping[str, Any]], name: str, favourite: str | None) -> str:
    """The fastest backend of a pass; the first shape's where it is about as fast: each other one is a graph of its own."""
    if name == "training":
        rows = [row for row in rows if row["backend"].removeprefix(SPANS) not in WITHOUT_GRADIENT] or rows
    least = min(rows, key=lambda row: row[name]["seconds"])
    close = {row["backend"] for row in rows if row[name]["seconds"] <= CLOSE * least[name]["seconds"]}
    return favourite if favourite is not None and favourite in close else least["backend"]


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
        return Choice(**told)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def use_choice(choice: Choice | None, backends: Iterable[str] | None = None) -> None:
    """Makes `backend: auto` take what was fastest: without a mask at each shape, and for layouts.

    Where no layout was measured, they take calls without a mask as soon as a kernel that takes none is the fastest.

    Args:
        choice: of the device at hand; None is PyTorch's own, and FlexAttention for layouts.
        backends: those that are there; by default `available_backends`. A chosen one that is gone counts as not measured.

    Example:
        >>> use_choice(None)
    """
    if choice is None:
        set_auto()
        return
    there = tuple(available_backends() if backends is None else backends)
    plain = {shape: found for shape, found in choice.fastest.items() if shape != LAYOUT}
    counts = {shape: (choice.queries[shape], choice.keys[shape]) for shape in plain}
    table: dict[str, Any] = {
        name: {counts[shape]: found[name] for shape, found in plain.items() if found[name] in there} or {(1, 1): "sdpa"}
        for name in PASSES
    }
    spans = max(table["training"].items())[1] in UNMASKED
    if LAYOUT in choice.fastest:
        spans = choice.fastest[LAYOUT]["training"].startswith(SPANS)
    set_auto(**table, layouts="spans" if spans else "flex")


def told(choice: Choice | None) -> dict[str, Any]:
    """A choice as plain values, for a report.

    Example:
        >>> told(None)
        {'full': {'forward': 'sdpa', 'training': 'sdpa'}}
    """
    return {"full": dict.fromkeys(PASSES, "sdpa")} if choice is None else choice.fastest
