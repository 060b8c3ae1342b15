"""What of a recipe is there: files, libraries, GPUs, attention backends, memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import attrs
import torch

from sftk.errors import SftkError
from sftk.functional.attention import FLASH, available_backends
from sftk.runtime.plan import plan_stage
from sftk.runtime.plan_rates import GIB
from sftk.runtime.readable import inspect_reader
from sftk.spec.arrangement import least_ranks
from sftk.spec.fetch import NamedFile, how_to_get, recipe_files
from sftk.spec.readers import Reader, recipe_readers
from sftk.spec.recipe import Stage
from sftk.spec.stores import store_problems

LIBRARIES = ("torch", "tensordict", "safetensors", "lmdb", "av", "transformers", "diffusers", "torchao", "huggingface_hub")
"""What runs use; the last four only where a recipe asks for it."""


_SAMPLING = ", only to sample"


@attrs.frozen(kw_only=True)
class Finding:
    """One line of a diagnosis: `ok`, `note` (known, not in the way) or `missing` (a run would stop there)."""

    kind: Literal["ok", "note", "missing"]
    text: str


def examine(stage: Stage) -> Iterator[Finding]:
    """Looks at what a stage needs on this machine.

    Args:
        stage: from `load_recipe`.

    Example:
        >>> from sftk.spec.recipe import load_recipe
        >>> found = list(examine(load_recipe("recipes/digits/df.yaml")[0]))
        >>> [finding.text for finding in found if finding.text.startswith("models.")]
        ['models.denoiser: 0.7 M weights, which fit']
    """
    for file in recipe_files(stage):
        yield _file(file, stage)
    for reader in recipe_readers(stage.recipe):
        yield from _reader(reader, stage)
    yield from (Finding(kind="missing", text=f"data: {problem}") for problem in store_problems(stage))
    yield Finding(kind="ok", text=_libraries())
    yield from _devices(stage)


def _file(file: NamedFile, stage: Stage) -> Finding:
    what = f"{file.name} ({', '.join(file.used_by)}){_SAMPLING * file.sampling}"
    if file.path is None:
        how = how_to_get(file.folder or file.name, stage.recipe.fetch)
        return Finding(kind=_lacks(file.sampling), text=f"{what}: not here\n{'':10}{how}")
    size = _size(file.path)
    if size == 0:
        return Finding(kind=_lacks(file.sampling), text=f"{what}: {file.path} is empty; download it again")
    return Finding(kind="ok", text=f"{what}: {size / GIB:.3f} GiB")


def _reader(reader: Reader, stage: Stage) -> Iterator[Finding]:
    """What one reader finds in its files, when they are here."""
    what = f"{'.'.join(map(str, reader.place))}{_SAMPLING * reader.sampling}"
    try:
        count = inspect_reader(reader, stage)
    except SftkError as error:
        yield Finding(kind=_lacks(reader.sampling), text=f"{what}: {str(error).replace(chr(10), chr(10) + ' ' * 10)}")
        return
    if count is not None:
        yield Finding(kind="ok", text=f"{what}: {count / 1e6:.1f} M weights, which fit")


def _lacks(sampling: bool) -> Literal["note", "missing"]:
    """What it is that something is not here: a run stops only for what training reads."""
    return "note" if sampling else "missing"


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _libraries() -> str:
    versions = []
    for name in LIBRARIES:
        try:
            # PyTorch's own word says which build it is, as in 2.11.0+cu130.
            version = torch.__version__ if name == "torch" else importlib.metadata.version(name)
            versions.append(f"{name} {version}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return "libraries: " + ", ".join(versions)


def _devices(stage: Stage) -> Iterator[Finding]:
    ranks = least_ranks(stage.recipe)
    plan = plan_stage(_one_pass(stage, ranks), gpus=ranks, gpu_name="h100", advice=False)
    needed = f"memory: one rank{f' of {ranks}' * (ranks > 1)} needs about {plan.peak / GIB:.1f} GiB"
    if not torch.cuda.is_available():
        reason = "this build of torch has no CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        yield Finding(kind="missing" if stage.recipe.device == "cuda" else "note", text=f"CUDA: {reason}")
        yield Finding(kind="note", text=f"{needed} on a GPU; sftk plan says how it is made up")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(kind="ok", text=f"GPU {index}: {name}, {total / GIB:.1f} GiB, CUDA {torch.version.cuda}")
        fits = plan.peak <= free
        text = f"{needed}, GPU {index} has {free / GIB:.1f} GiB free" + ("" if fits else "; sftk plan says what would help")
        yield Finding(kind="ok" if fits else "missing", text=text)
    backends = available_backends()
    yield Finding(kind="ok", text="attention: " + ", ".join(backends))
    for role, model in stage.recipe.models.items():
        if model.backend != "auto" and model.backend not in backends:
            fix = "pip install 'sftk[flash]'" if model.backend in FLASH else "it needs CUDA"
            yield Finding(kind="missing", text=f"attention: {role} asks for {model.backend!r}; {fix}")


def _one_pass(stage: Stage, ranks: int) -> Stage:
    """The stage with a batch that each of so many ranks takes in one pass, as large as theirs of the recipe's batch."""
    batch, parts = stage.recipe.batch, ranks // stage.recipe.parallel.sequence
    per_rank = batch.per_rank or max(batch.global_ // parts, 1)
    batch = attrs.evolve(batch, per_rank=per_rank, global_=per_rank * parts)
    return attrs.evolve(stage, recipe=attrs.evolve(stage.recipe, batch=batch))
