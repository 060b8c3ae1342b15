"""Stores of another size than a recipe's: refused before the first stage, by all that look at data."""

from __future__ import annotations

import io
import re

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from sftk.cli import main
from sftk.data.lmdb_store import write_store
from sftk.errors import SpecError
from sftk.runtime.prepare import prepare_recipe
from sftk.runtime.run import run_recipe
from sftk.runtime.study import run_study

DATA = "use: digits, with: {split: train, size: 7}"
STAGES = "version: 1\nstages:\n  - {name: first, recipe: tiny.yaml}\n  - {name: second, recipe: stored.yaml}\n"
STUDY = "version: 1\nmatrix:\n  - {name: first, recipe: tiny.yaml}\n  - {name: second, recipe: stored.yaml}\n"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """`store(*shape, name="clips", shards=None)`: a store of three records; the folder it lies in is the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*shape, name="clips", shards=None):
        write_store(tmp_path / name, [(torch.zeros(shape), f"a {i} moving up") for i in range(3)], shards=shards)

    return make


@pytest.fixture
def stored(tiny):
    """`stored(with_, use="latents")`: a recipe after `tiny.yaml`, with such data; `both.yaml` and `study.yaml` name them."""

    def write(with_="{path: clips, text: digits}", use="latents"):
        path = tiny(DATA, f"use: {use}, with: {with_}", name="stored.yaml")
        tiny()
        (path.parent / "both.yaml").write_text(STAGES)
        (path.parent / "study.yaml").write_text(STUDY)
        return path

    return write


SAID = (
    r"clips holds latents of \[6, 4, 8, 9\], the recipe says \[6, 4, 8, 8\] \(frames, channels, height, width\); "
    r"set latents: {frames: 6, channels: 4, height: 8, width: 9} in the recipe, or name a store of that size"
)
WHERE = r" @ \$\.data\.with \(stored\.yaml:\d+\)"


@pytest.mark.parametrize("shards", [None, 2])
def test_before_the_first_stage(store, stored, tmp_path, shards):
    store(6, 4, 8, 9, shards=shards)
    stored()
    with pytest.raises(SpecError, match="stage 'second': .*" + SAID + WHERE):
        run_recipe("both.yaml", run_dir=tmp_path / "run", console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
    with pytest.raises(SpecError, match=SAID + WHERE):
        run_study("study.yaml", run_dir=tmp_path / "study", console=Console(file=io.StringIO()))
    assert not (tmp_path / "study").exists()
    ranks = CliRunner().invoke(main, ["run", "both.yaml", "--nproc", "2", "--run-dir", "ranks"])
    assert ranks.exit_code == 2
    assert re.search(SAID + WHERE, ranks.output)
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize("name", ["both.yaml", "study.yaml", "stored.yaml"])
def test_commands_that_look_at_data(store, stored, name):
    store(6, 4, 8, 9)
    stored()
    found = CliRunner().invoke(main, ["check", name])
    assert found.exit_code == 2
    assert re.search(SAID + WHERE, found.output)
    if name != "study.yaml":
        found = CliRunner().invoke(main, ["doctor", name])
        assert found.exit_code == 1
        assert re.search("missing +data: stage '(second|stored)': .*" + SAID + WHERE, found.output)


def test_what_fits_or_is_not_there_yet(store, stored):
    pairs = "{path: pairs, text: digits, keep: [1000, 0]}"
    stored(pairs, "ode_pairs")
    assert CliRunner().invoke(main, ["check", "both.yaml"]).exit_code == 0  # an earlier stage may make them
    store(2, 6, 4, 8, 8, name="pairs")
    assert CliRunner().invoke(main, ["check", "both.yaml"]).exit_code == 0
    store(6, 4, 8, 8)
    stored()
    assert CliRunner().invoke(main, ["check", "both.yaml"]).exit_code == 0
    # What its stage leaves out is no mistake.
    write_store("mixed/a", [(torch.zeros(6, 4, 8, 8), "a 3 moving up")])
    write_store("mixed/b", [(torch.zeros(6, 4, 8, 9), "a 3 moving up")])
    stored("{path: mixed, text: digits, skip_bad: true}")
    assert CliRunner().invoke(main, ["check", "both.yaml"]).exit_code == 0
    stored("{path: mixed, text: digits}")
    found = CliRunner().invoke(main, ["check", "both.yaml"])
    assert (found.exit_code, "the shards of a store have one shape" in found.output) == (2, True)


def test_pairs_that_a_stage_goes_on_with(store, stored, tiny_weights):
    """The store has a shard of another size, and one of which nothing is known yet."""
    teacher = f"teacher: {{size: digits, weights: {tiny_weights}/teacher.safetensors}}"
    wanted = f"text: digits, count: 6, shard: 3, keep: [1000, 0], {teacher}, source: {{use: digits, with: {{split: train}}}}"
    stored(f"{{path: pairs, {wanted}}}", "ode_pairs")
    assert CliRunner().invoke(main, ["check", "both.yaml"]).exit_code == 0
    store(2, 6, 4, 8, 9, name="pairs/shard_00001")
    found = CliRunner().invoke(main, ["check", "both.yaml"])
    assert found.exit_code == 2
    assert re.search(r"stage 'second': pairs/\S+ holds latents of \[6, 4, 8, 9\].*" + WHERE, found.output)
    with pytest.raises(SpecError, match=r"holds latents of \[6, 4, 8, 9\]"):
        prepare_recipe("both.yaml")
