"""For benchmarks of several ranks: starts them, and times the updates of a stage on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from sftk.runtime.build import Built, build_stage
from sftk.runtime.device import device_name, pick_device
from sftk.runtime.loader import make_loader
from sftk.runtime.mesh import Mesh, make_mesh
from sftk.runtime.plan_rates import GIB
from sftk.runtime.step import TrainingStep
from sftk.runtime.world import World
from sftk.spec.recipe import Stage

TINY_SIZE = (
    "{dim: 96, ffn_dim: 384, num_heads: 4, num_layers: 2, in_dim: 16, out_dim: 16, freq_dim: 96, text_dim: 32, text_len: 4}"
)
TINY = [f"models.{role}.size={TINY_SIZE}" for role in ("generator", "real_score", "fake_score")]
TINY += ["latents.frames=6", "latents.height=8", "latents.width=8", "data.with={text_len: 4, text_dim: 32}", "device=cpu"]
"""Overrides of benchmarks/dmd_1.3b.yaml that make it run on CPU cores."""


@attrs.define
class Ranks:
    """Processes that measure something: torchrun's, and the file that their first rank writes what it found to.

    Args:
        script: is called with `arguments` and `--rank-out FILE`. ranks: how many. devices: that they see; None is all.
    """

    script: str
    ranks: int
    arguments: Sequence[str]
    devices: Sequence[int] | None = None
    _process: subprocess.Popen[bytes] = attrs.field(init=False)
    _folder: tempfile.TemporaryDirectory[str] = attrs.field(init=False, factory=tempfile.TemporaryDirectory)

    def __attrs_post_init__(self) -> None:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", self.script]
        env = dict(os.environ)
        if self.devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.devices))
        with (self._path / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*line, *self.arguments, "--rank-out", str(self._path / "found.json")],
                env=env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def result(self, seconds: float) -> dict[str, Any]:
        """What was found within so many seconds from now; then the processes are gone. A failure is told as `problem`."""
        problem = None
        try:
            code = self._process.wait(max(seconds, 0.1))
            if code:
                problem = f"exit code {code}: " + _last_error((self._path / "log").read_text(errors="replace"))
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s more than the ones before it took"
        self.stop()
        file = self._path / "found.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        self._folder.cleanup()
        return found | ({"problem": problem} if problem else {})

    def stop(self) -> None:
        """Ends the processes, if they are still there."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, kind)
                try:
                    self._process.wait(15)
                except subprocess.TimeoutExpired:
                    continue

    @property
    def _path(self) -> Path:
        return Path(self._folder.name)


def build_ranks(stage: Stage, world: World) -> tuple[Built, dict[str, Any]]:
    """A stage with random weights on this rank's device, and what building it took."""
    device = pick_device(stage.recipe.device)
    mesh = make_mesh(stage.recipe, world, device)
    begin = time.perf_counter()
    built = build_stage(stage, device, {}, mesh)
    with torch.no_grad():  # a fresh model's head is zero, and so would be every loss
        for module in built.modules.values():
            module.get_parameter("head.head.weight").fill_(0.02)
    seconds = time.perf_counter() - begin
    facts = {"device": device_name(device), "torch": torch.__version__, "ranks": world.size}
    return built, facts | {"build_seconds": round(seconds, 1), "build_peak_gib": peak_gib(mesh)}


def time_updates(stage: Stage, built: Built, updates: int) -> Iterator[dict[str, Any]]:
    """After each step what is known so far: seconds of each phase on the slowest rank, losses, the most memory of any rank.

    The samples, noise and exit steps are the same in all settings. The first step, which allocates the optimiser's states and
    starts the libraries, is told apart; without others the memory is its own.

    Args:
        updates: steps after the first.
    """
    mesh = built.mesh
    loader = make_loader(stage.recipe, rank=mesh.data_rank, world=mesh.data_world)
    step = TrainingStep(stage.recipe, built, iter(loader))
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {turn.name: [] for turn in built.turns}
    losses: dict[str, list[float]] = {turn.name: [] for turn in built.turns}
    for number in range(updates + 1):
        reset_peak()
        outputs: dict[str, Any] = {}
        inputs: dict[str, Any] = {}
        for turn in built.turns:
            mesh.sum(torch.zeros(1, device=built.device))  # all begin together
            wait(built.device)
            begin = time.perf_counter()
            metrics = step.run_turn(turn, number, outputs, inputs)
            wait(built.device)
            taken = round(max(mesh.gather(time.perf_counter() - begin)), 4)
            if number == 0:
                first[turn.name] = taken
            else:
                seconds[turn.name].append(taken)
                losses[turn.name].append(metrics[f"{turn.phase.name}/loss"].item())
        yield {"first_seconds": first, "seconds": seconds, "losses": losses, "peak_gib": peak_gib(mesh)}


def reset_peak() -> None:
    """Begins to watch the device's memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib(mesh: Mesh) -> float:
    """Most memory that any rank held since, in GiB; 0 on the CPU."""
    peak = torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else 0
    return round(max(mesh.gather(peak)) / GIB, 2)


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _last_error(log: str) -> str:
    """The line of a log that says most."""
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (said or lines or [""])[-1][-400:]
