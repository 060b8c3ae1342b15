"""A complete DMD recipe with tiny random models, and a quiet way to run it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sftk.models.weights import save_weights

TINY = """\
version: 1
seed: 3
latents: {frames: 6, channels: 4, height: 8, width: 8}
data: {use: digits, with: {split: train, size: 7}}
models:
  generator: {size: SIZE, weights: FOLDER/student.safetensors}
  real_score: {size: SIZE, weights: FOLDER/teacher.safetensors}
  fake_score: {size: SIZE, weights: FOLDER/critic.safetensors}
optimizers:
  generator: {lr: 1e-3, betas: [0.0, 0.99], warmup: 2, schedule: cosine}
  fake_score: {lr: 2e-3, schedule: linear, decay_from: 0.5, final: 0.1}
phases:
  - name: generator
    update: generator
    every: 2
    graph: specs/dmd_generator.yaml
    with: {steps: [1000, 500], shift: 3.0, guidance: 2.0}
    clip: 1.0
    log: [gradient_norm]
  - {name: critic, update: fake_score, graph: specs/score_critic.yaml, with: {steps: [1000, 500], shift: 3.0}, clip: 1.0}
train: {steps: 4}
batch: {global: 2}
ema: {generator: {decay: 0.5, start: 3}}
checkpoint: {every: 2}
track: {tensorboard: false}
device: cpu
"""
SIZE = "{dim: 24, ffn_dim: 32, num_heads: 2, num_layers: 2, in_dim: 4, out_dim: 4, freq_dim: 16, text_dim: 32, text_len: 4}"


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory, make_model):
    """A folder of weights that are random everywhere: a fresh model's head is zero, and then every loss is trivial."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("student", "teacher", "critic")):
        save_weights(make_model(torch.float32, seed, text_dim=32), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def tiny(tmp_path, tiny_weights):
    """`tiny(old, new, ...)`: the recipe's file, with texts replaced."""

    def write(*changes: str, name: str = "tiny.yaml") -> Path:
        text = TINY
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text.replace("SIZE", SIZE).replace("FOLDER", str(tiny_weights)))
        return path

    return write


@pytest.fixture
def train(tmp_path):
    """`train(recipe, *overrides, to="run", resume=False)`: a run in this process; returns its folder's `RunDir`."""
    from sftk.runtime.run import run_recipe

    def run(recipe, *overrides, to="run", **options):
        return run_recipe(recipe, overrides, run_dir=tmp_path / to, console=Console(file=io.StringIO()), **options)

    return run


@pytest.fixture
def command():
    """`command(*arguments, cwd=...)`: starts `sftk` as a process of its own, with one thread."""
    started = []

    def start(*arguments, cwd=None):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "sftk", *map(str, arguments)]
        process = subprocess.Popen(line, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
