"""What low precision costs in accuracy and saves in time and memory, at the size of Wan 2.1 1.3B with random weights: JSON.

    python benchmarks/lowp.py > lowp.json                        # an H100 or H200; some minutes
    python benchmarks/lowp.py --only full,other,fp8 latents.frames=12
    python benchmarks/lowp.py --tiny --device cpu                # a tiny model on the CPU, to try the script

Every setting has the same weights, noise and prompts and does this of `benchmarks/dmd_1.3b.yaml` without gradient: the
student's whole rollout through all steps (`x0`), the gradient of distribution matching at the first setting's samples
(`gradient`), at its own (`gradient_of_own`), and at the first's again with a critic that is a copy of the teacher
(`gradient_near`): training begins so, and what is left is guidance. A trained critic lies between. With gradient, it computes
that of the critic's denoising loss at the first setting's samples for the critic's weights (`weights`: all together, the median
tensor and the worst). Errors are norms of
differences to the first setting over its norm. The first is bf16 with the attention that `auto` takes; the second has another
attention kernel and compiles nothing, which shows what rounding alone does; the last is float32. Seconds are medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sftk.core.graph import Graph
from sftk.functional.attention import available_backends
from sftk.functional.keys import Key
from sftk.models import pass_kind
from sftk.runtime.bench_cases import randomise_zeros
from sftk.runtime.bench_measure import measure
from sftk.runtime.build import Built, build_stage
from sftk.runtime.device import device_name, pick_device
from sftk.runtime.loader import make_loader
from sftk.spec.recipe import Stage, load_recipe

RECIPE = "benchmarks/dmd_1.3b.yaml"
ROLES = ("generator", "real_score", "fake_score")
TINY_SIZE = (
    "{dim: 64, ffn_dim: 128, num_heads: 2, num_layers: 2, in_dim: 16, out_dim: 16, freq_dim: 32, text_dim: 32, text_len: 4}"
)
TINY = [f"models.{role}.size={TINY_SIZE}" for role in ROLES]
TINY += [
    "models.real_score.dtype=fp32",
    "latents.frames=6",
    "latents.height=8",
    "latents.width=8",
    "data.with={text_len: 4, text_dim: 32}",
]
OTHER = ("sdpa_cudnn", "sdpa_flash")
"""Backends of which the second setting takes the first that is there; else none, and it differs in compilation alone."""


def settings(compiled: bool) -> dict[str, list[str]]:
    """Name to overrides of the recipe."""
    compile_ = [f"compile={'true' if compiled else 'false'}"]
    backend = next((name for name in OTHER if name in available_backends()), None)
    other = [f"models.{role}.backend={backend}" for role in ROLES] if backend else ["precision=tf32"]
    return {
        "full": compile_,
        "other": [*other, "compile=false"],
        "fp8_training": [*compile_, "lowp.training=fp8"],
        "fp8_attention": [*compile_, "lowp.attention=fp8"],
        "fp8_both": [*compile_, "lowp={training: fp8, attention: fp8}"],
        "fp8_student": [*compile_, "models.generator.lowp.linears=fp8"],
        "fp8_scores": [*compile_, "models.real_score.lowp.linears=fp8", "models.fake_score.lowp.linears=fp8"],
        "fp8": [*compile_, "lowp.linears=fp8"],
        "kv_int8": [*compile_, "lowp.kv_cache=int8"],
        "kv_fp8": [*compile_, "lowp.kv_cache=fp8"],
        "all": [*compile_, "lowp={linears: fp8, training: fp8, kv_cache: int8}"],
        "fp32": ["precision=fp32", "compile=false"],
    }


def prepare(stage: Stage, device: torch.device) -> tuple[Built, dict[str, Any]]:
    """The models with weights of Wan's initialisation (its zeros drawn, too), and a batch with noise: the same every time."""
    torch.manual_seed(0)
    built = build_stage(stage, device, {})
    for module in built.modules.values():
        randomise_zeros(module)
        module.requires_grad_(False)
    batch = next(iter(make_loader(stage.recipe, stage.path)))
    values = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    key, latents = Key(seed=0, phase="generator", samples=(0,)), stage.recipe.latents
    shape = (latents.frames, latents.channels, latents.height, latents.width)
    return built, values | {"key": key, "noise": key.normal("noise", shape, device=device)}


def weight_gradients(built: Built, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of the critic's denoising loss for all of its weights."""
    graph, critic = Graph.from_spec("specs/critic.yaml"), built.modules["fake_score"].requires_grad_(True)
    state = graph.run(values, {"fake_score": built.ports["fake_score"]})
    names, weights = zip(*critic.state_dict(keep_vars=True).items(), strict=True)
    gradients = torch.autograd.grad(state["loss"] / state["loss_weight"], weights)
    critic.requires_grad_(False)
    return dict(zip(names, gradients, strict=True))


def run_setting(
    name: str, overrides: list[str], device: torch.device, repeats: int, first: Mapping[str, Tensor]
) -> dict[str, Any]:
    """One setting: tensors on the host under `tensors` and `weights`, and what was measured."""
    (stage,) = load_recipe(RECIPE, overrides)
    built, values = prepare(stage, device)
    rollout = Graph.from_spec("specs/rollout.yaml", last_step_only=True, **stage.recipe.lowp.defaults).subgraph(["x0"])
    scores = Graph.from_spec("specs/dmd.yaml").subgraph(["grad"])
    ports = built.ports

    @torch.no_grad()
    def sample() -> Tensor:
        return rollout.run(values, {"denoiser": ports["generator"]})["x0"]

    @torch.no_grad()
    def gradient(x0: Tensor) -> Tensor:
        return scores.run(values | {"x0": x0}, {role: ports[role] for role in scores.ports})["grad"]

    x0 = sample()
    given = first["x0"].to(device) if first else x0
    tensors = {"x0": x0.cpu(), "gradient": gradient(given).cpu(), "gradient_of_own": gradient(x0).cpu()}
    calls: dict[str, Callable[[], Any]] = {"rollout": sample, "scores": lambda: gradient(given)}
    calls["critic"] = lambda: weight_gradients(built, values | {"x0": given})
    measured = {case: measure(call, device, warmup=1, repeats=repeats) for case, call in calls.items()}
    weights = {key: value.cpu() for key, value in weight_gradients(built, values | {"x0": given}).items()}
    ports = ports | {"fake_score": ports["real_score"]}
    tensors["gradient_near"] = gradient(given).cpu()
    return {
        "setting": name,
        "overrides": overrides,
        "tensors": tensors,
        "weights": weights,
        "seconds": {case: found.median for case, found in measured.items()},
        "spread": {case: max(found.seconds) - min(found.seconds) for case, found in measured.items()},
        "held_bytes": measured["rollout"].held,
        "peak_bytes": {case: found.allocated for case, found in measured.items()},
    }


def relative(found: Tensor, reference: Tensor) -> float:
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


def of_weights(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """Errors of all gradients together, and of single tensors that have one."""
    pairs = {name: (found[name].double(), value.double()) for name, value in reference.items()}
    squares = [[(one - other).square().sum(), other.square().sum()] for one, other in pairs.values()]
    lost, whole = torch.tensor(squares, dtype=torch.float64).sum(0)
    each = {name: relative(*pair) for name, pair in pairs.items() if pair[1].any()}
    worst = max(each, key=lambda name: each[name])
    return {
        "all": (lost / whole).sqrt().item(),
        "median": statistics.median(each.values()),
        "worst": each[worst],
        "worst_name": worst,
    }


def by_block(found: Tensor, reference: Tensor, frames: int) -> list[float]:
    """The error of each block, since a rollout adds up what its context lost."""
    pairs = zip(found.split(frames, dim=1), reference.split(frames, dim=1), strict=True)
    return [relative(one, other) for one, other in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="of the recipe, for every setting")
    parser.add_argument("--only", help="settings, with commas; the first is always there")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    if options.tiny:
        pass_kind.FP8_TRAINING = 0  # as the real size has it
    device = pick_device(options.device)
    wanted = settings(device.type == "cuda" and not options.eager)
    chosen = [name for name in wanted if options.only is None or name in ("full", *options.only.split(","))]
    common = [*(TINY if options.tiny else []), f"device={device.type}", *options.overrides]
    rows: list[dict[str, Any]] = []
    first: dict[str, Tensor] = {}
    first_weights: dict[str, Tensor] = {}
    for name in chosen:
        row: dict[str, Any] = {"setting": name}
        try:
            row = run_setting(name, [*common, *wanted[name]], device, options.repeats, first)
            tensors, weights = row.pop("tensors"), row.pop("weights")
            first, first_weights = first or tensors, first_weights or weights
            row["weights"] = of_weights(weights, first_weights)
            row["errors"] = {key: relative(value, first[key]) for key, value in tensors.items()}
            row["x0_by_block"] = by_block(tensors["x0"], first["x0"], 3)
            row["norms"] = {key: value.norm().item() / value.numel() ** 0.5 for key, value in tensors.items()}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({"device": device_name(device), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
