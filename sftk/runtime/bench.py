"""`sftk bench`: measures the work of recipes, variant by variant, against what is counted; one failure stops nothing else."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

import sftk
from sftk.data.sources import source
from sftk.errors import SpecError
from sftk.functional.layout import flex_mask, token_mask
from sftk.models.rope import rope_table
from sftk.models.vae import TEMPORAL_FACTOR
from sftk.runtime.acceleration import backbones, compiles, fuses, replays_passes
from sftk.runtime.attention_auto import settle_attention
from sftk.runtime.bench_cases import ROLLOUT, Cases, case_names, rollout_graph
from sftk.runtime.bench_count import Counts, count_cases
from sftk.runtime.bench_device import device_facts
from sftk.runtime.bench_measure import measure
from sftk.runtime.bench_profile import profile_call
from sftk.runtime.bench_rows import Row, failed_row, measured_row, summary_rows
from sftk.runtime.build import build_stage
from sftk.runtime.cuda_graphs import release_room_memory
from sftk.runtime.device import device_name, pick_device
from sftk.runtime.plan_rates import GPUS, known_gpu
from sftk.runtime.segments import compile_segments
from sftk.spec.recipe import Stage
from sftk.spec.schema import Recipe
from sftk.spec.turns import cycle
from sftk.spec.variants import Variant

KERNELS = 40
"""Kernels that a profile lists by name."""


@attrs.frozen(kw_only=True)
class BenchOptions:
    """What to measure, and how long.

    Args:
        only: cases, see `case_names`. exit_steps: places in the step list; none means all.
        repeats, warmup, most_seconds: see `measure`; the warm-up is that of a case's first exit step.
        profile: folder for traces, or None.
    """

    only: tuple[str, ...] = ()
    exit_steps: tuple[int, ...] = ()
    repeats: int = 3
    warmup: int = 1
    most_seconds: float = 6.0
    profile: Path | None = None


def run_bench(
    variants: Sequence[Variant],
    options: BenchOptions,
    *,
    say: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measures variants one after the other; a case or a variant that fails leaves its error and frees its memory.

    Args:
        variants: from `load_variants`.
        say: told of progress, line by line.
        save: given the report so far after each row.

    Returns:
        The report, made of plain values: facts about the device, and for each variant its facts, rows, summary and profiles.

    Raises:
        SpecError: a variant has no case that is asked for; nothing was measured.

    Example:
        >>> from sftk.spec.variants import load_variants
        >>> variants = load_variants("recipes/digits/df.yaml", ["batch.global=1", "device=cpu"])
        >>> report = run_bench(variants, BenchOptions(only=("forward",), repeats=2))
        >>> [(row["case"], row["repeats"]) for row in report["variants"][0]["rows"]]
        [('forward', 2)]
    """
    for variant in variants:
        case_names(variant.stage, options.only)
    first = variants[0].stage.recipe
    device = pick_device(first.device)
    settle_attention(backbones(first), first.latents, first.precision, device, say=say)
    report: dict[str, Any] = {"sftk": sftk.__version__, "device": device_facts(device), "variants": []}
    counted: dict[str, Counts] = {}
    for variant in variants:
        found: dict[str, Any] = {"name": variant.name, "overrides": list(variant.overrides), **recipe_facts(variant.stage)}
        report["variants"].append(found)
        began = time.perf_counter()
        try:
            _Run(variant, options, found, counted, say, lambda: save(report)).all()
        except Exception as error:
            found["error"] = _words(error)
            say(f"{variant.name}: {found['error']}")
        free_memory()
        found["whole_seconds"] = time.perf_counter() - began
        save(report)
    return report


def recipe_facts(stage: Stage) -> dict[str, Any]:
    """What a reader must know of a recipe to compare its times with others'."""
    recipe = stage.recipe
    per_rank, accumulation = recipe.batch.split()
    return {
        "recipe": stage.name,
        "latents": attrs.asdict(recipe.latents),
        "batch": {"per_pass": per_rank, "passes": accumulation},
        "precision": recipe.precision,
        "compiled": compiles(recipe, pick_device(recipe.device)),
        "cuda_graphs": replays_passes(recipe, pick_device(recipe.device)),
        "triton_kernels": fuses(recipe, pick_device(recipe.device)),
        "models": {
            role: {"dtype": model.dtype, "checkpoint": model.checkpoint, "backend": model.backend}
            for role, model in recipe.models.items()
            if model.size is not None
        },
    }


def free_memory() -> None:
    """Drops what a variant left: cycles, tables kept by functions, compiled graphs, the allocator's reserve."""
    for kept in (rope_table, token_mask, flex_mask):
        kept.cache_clear()
    torch.compiler.reset()
    gc.collect()
    release_room_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Run:
    """One variant."""

    def __init__(
        self,
        variant: Variant,
        options: BenchOptions,
        found: dict[str, Any],
        counted: dict[str, Counts],
        say: Callable[[str], None],
        save: Callable[[], None],
    ):
        self.variant, self.options, self.found = variant, options, found
        self.counted, self.say, self.save = counted, say, save
        self.rows: list[Row] = found.setdefault("rows", [])

    def all(self) -> None:
        """Counts, builds and measures."""
        stage, options = self.variant.stage, self.options
        recipe, names = stage.recipe, case_names(stage, options.only)
        self.say(f"{self.variant.name}: counting")
        key = _what_counts(recipe) + repr(names)
        if key not in self.counted:
            self.counted[key] = count_cases(stage, names)
        self.work = self.counted[key]
        turns = [turn.name for turn in stage.turns]
        exits = {name: [exit_ for case, exit_ in self.work if case == name] for name in turns if name in names}
        chosen = {name: self._chosen(name, found) for name, found in exits.items()}
        self.say(f"{self.variant.name}: building")
        device = pick_device(recipe.device)
        name = known_gpu(device_name(device)) if device.type == "cuda" else None
        self.gpu = GPUS[name] if name else None
        self.built = build_stage(stage, device, {})
        graph, student = rollout_graph(stage)
        graph = compile_segments(graph) if compiles(recipe, device) else graph
        self.cases = Cases(stage, self.built, graph, student)
        for case in names:
            self._measure(case, chosen.get(case, [None]))
            self.found["summary"] = summary_rows(self.rows, exits, cycle(stage.turns))
            self.save()

    def _chosen(self, phase: str, exits: Sequence[int | None]) -> list[int | None]:
        """The exit steps to measure, the last first: it calls the model in every way that the others do."""
        wanted = self.options.exit_steps
        unknown = [exit_ for exit_ in wanted if exit_ not in exits] if exits != [None] else []
        if unknown:
            raise SpecError(f"the phase {phase!r} has the exit steps {exits}, found {unknown} in --exit-step")
        return [exit_ for exit_ in reversed(exits) if not wanted or exit_ is None or exit_ in wanted]

    def _measure(self, name: str, exits: Sequence[int | None]) -> None:
        options, device, warm = self.options, self.built.device, False
        for exit_step in exits:
            place = name if exit_step is None else f"{name}, exit step {exit_step}"
            try:
                (case,) = self.cases.make(name, [exit_step])
                warmup = 0 if warm else options.warmup
                measured = measure(case.run, device, warmup=warmup, repeats=options.repeats, most_seconds=options.most_seconds)
                work = self.work.get((name, exit_step))
                row = measured_row(name, exit_step, measured, work, self.gpu, self.variant.stage.recipe.precision)
                if name == ROLLOUT:
                    row |= self._frames(row)
                if options.profile is not None and not warm:
                    self._profile(place, case.run, options.profile)
                warm = True
                self.say(f"{self.variant.name}: {place}: {measured.median:.4g} s after {measured.warmup_seconds:.3g} s")
            except Exception as error:
                row = failed_row(name, exit_step, _words(error))
                self.say(f"{self.variant.name}: {place}: {row['error']}")
            self.rows.append(row)
            if "error" in row:
                self.cases.clear()
                gc.collect()

    def _frames(self, row: Row) -> dict[str, Any]:
        """Pictures of a rollout, and how many a second."""
        recipe = self.variant.stage.recipe
        frames = recipe.latents.frames
        codec = source(recipe.data.use).codec  # the embedded task has a picture for each latent frame
        clip = 1 + TEMPORAL_FACTOR * (frames - 1) if codec is None else codec.pixel_frames(frames)
        pictures = recipe.batch.split()[0] * clip
        return {"pictures": pictures, "pictures_per_second": pictures / row["seconds"]}

    def _profile(self, place: str, run: Callable[[], Any], folder: Path) -> None:
        file = folder / f"{self.variant.name}-{place.replace(', exit step ', '-exit')}.json.gz"
        table = profile_call(run, self.built.device, file)
        told = attrs.asdict(attrs.evolve(table, kernels=dict(list(table.kernels.items())[:KERNELS])))
        self.found.setdefault("profiles", []).append({"case": place, "trace": str(file), **told})


def _what_counts(recipe: Recipe) -> str:
    """What decides how much a recipe computes, as text: variants that differ elsewhere are counted once."""
    models = {role: model if model.ready_made else attrs.evolve(model, backend="auto") for role, model in recipe.models.items()}
    parts = (recipe.latents, models, recipe.phases, recipe.batch, recipe.precision, recipe.compat, recipe.eval, recipe.data)
    parts = (*parts, recipe.share_rollout, recipe.lowp.kv_cache)
    return repr(parts)


def _words(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'without a message'}"


def write_json(report: dict[str, Any], path: Path) -> None:
    """Writes a report, in whole or not at all."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
