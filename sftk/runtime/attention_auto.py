"""What `backend: auto` is on a device: what was measured there before, or what is measured now, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sftk.functional.attention import available_backends
from sftk.models.config import WanConfig
from sftk.runtime.attention_choice import CACHE_VARIABLE, Choice, choose, find_choice, save_choice, use_choice
from sftk.runtime.attention_shapes import model_shapes
from sftk.runtime.bench_attention import bench_attention
from sftk.runtime.device import Precision, set_precision
from sftk.runtime.mesh import Mesh
from sftk.spec.schema import LatentsSection

WORTH = 2048
"""Tokens of a pass from which attention is measured: below, no choice matters."""
REPEATS = 3


def settle_attention(
    configs: Sequence[WanConfig],
    latents: LatentsSection,
    precision: Precision,
    device: torch.device,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Choice | None:
    """Sets what `backend: auto` takes from here on, and the precision.

    On CUDA in bfloat16 attention over long videos is measured where it never was, in some seconds, and the result kept for
    later runs; the first rank's holds for all. Whether layouts are faster by FlexAttention's mask is not measured, since that
    takes longer (`sftk bench attention --save` does it).

    Args:
        configs: of the models that will run; the widest one's attention is measured.
        latents: of one sample.
        say: told that something is measured.

    Returns:
        The choice, or None where PyTorch decides.

    Example:
        >>> latents = LatentsSection(frames=3, channels=4, height=8, width=8)
        >>> settle_attention([], latents, "fp32", torch.device("cpu")) is None
        True
    """
    choice = None
    if device.type == "cuda" and (mesh is None or mesh.first):
        choice = find_choice(device)
        if choice is None and precision == "bf16" and configs:
            choice = _measure(max(configs, key=lambda config: config.dim), latents, device, say)
    if mesh is not None:
        choice = mesh.share(choice)
    use_choice(choice)
    set_precision(precision)
    return choice


def _measure(config: WanConfig, latents: LatentsSection, device: torch.device, say: Callable[[str], None]) -> Choice | None:
    heads, shapes = model_shapes(config, latents, batch=1, precision="bf16")
    if shapes[0].queries < WORTH:
        return None
    last = sum(shape.name.startswith("cached") for shape in shapes) - 1
    names = {"full", "cached 0", f"cached {(last + 1) // 2}", f"cached {last}", "cross", "cross block"}
    say(f"measuring attention ({', '.join(available_backends())}) once on this device")
    set_precision("fp32")  # what errors are found against is exact
    report = bench_attention(heads, [shape for shape in shapes if shape.name in names], device, repeats=REPEATS)
    choice = choose(report)
    try:
        save_choice(choice)
    except OSError as error:  # a folder that may not be written to keeps no run from training
        say(f"what was measured cannot be kept for later runs: {error}; {CACHE_VARIABLE} names another folder")
    return choice
