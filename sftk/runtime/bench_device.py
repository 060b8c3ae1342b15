"""What a benchmark ran on: device, driver, libraries, attention backends."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

import torch

from sftk.functional.attention import available_backends
from sftk.runtime.attention_choice import find_choice, told
from sftk.runtime.device import device_name
from sftk.runtime.plan_rates import known_gpu


def device_facts(device: torch.device) -> dict[str, Any]:
    """Facts that a measured time depends on, as plain values.

    Example:
        >>> facts = device_facts(torch.device("cpu"))
        >>> facts["type"], facts["gpu"]
        ('cpu', None)
    """
    facts: dict[str, Any] = {
        "type": device.type,
        "name": device_name(device),
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attention": list(available_backends()),
        "auto": told(find_choice(device) if device.type == "cuda" else None),
    }
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    return facts | {
        "gpu": known_gpu(facts["name"]),
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The driver's version, where nvidia-smi tells it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
