"""ODE pairs: what they hold, and that kills, restarts and company change no bit of them."""

from __future__ import annotations

import io
import random
import signal
import time

import lmdb
import pytest
import torch
from filelock import FileLock
from forked import forks
from rich.console import Console
from safetensors.torch import load_file

from sftk.core.graph import Graph
from sftk.data.digits import DigitClips, embed_prompts
from sftk.data.lmdb_layout import close_environments, open_for_reading, read_about, read_header
from sftk.data.lmdb_store import LatentStore, shard_folders
from sftk.errors import CheckpointError, DataError, SpecError
from sftk.functional.keys import Key
from sftk.models.wan import WanModel
from sftk.models.weights import read_config
from sftk.runtime.inference import load_sampler
from sftk.runtime.loader import make_loader
from sftk.runtime.ode_pairs import file_digest, make_pairs, pair_job
from sftk.runtime.port import Port
from sftk.runtime.prepare import prepare_recipe
from sftk.runtime.run import run_recipe
from sftk.spec.recipe import load_recipe

PAIRS = """\
data:
  use: ode_pairs
  with:
    path: PATH
    text: digits
    count: 14
    source: {use: digits, with: {split: test}}
    teacher: {size: SIZE, weights: FOLDER/teacher.safetensors}
    solver: {steps: 8, shift: 3.0, guidance: 2.0}
    keep_shift: 3.0
    shard: 4
    batch: 2
    seed: 5
"""


@pytest.fixture
def recipe(tiny, tmp_path):
    """`recipe(name)`: a recipe whose pairs go to that folder."""

    def write(name="pairs"):
        pairs = PAIRS.replace("PATH", str(tmp_path / name))
        return tiny("data: {use: digits, with: {split: train, size: 7}}\n", pairs, name=f"{name}.yaml")

    return write


def contents(path):
    """Keys and values of each shard."""
    found = {}
    for folder in shard_folders(path):
        with open_for_reading(folder) as environment, environment.begin() as transaction:
            found |= {(folder.name, bytes(key)): bytes(value) for key, value in transaction.cursor()}
    return found


def test_records(recipe, tmp_path, tiny_weights):
    prepare_recipe(recipe())
    store = LatentStore.open(tmp_path / "pairs")
    assert (len(store), store.shape) == (14, (5, 6, 4, 8, 8))
    assert [read_header(shard.folder).count for shard in store.shards] == [4, 4, 4, 2]
    assert read_about(store.shards[2].folder)["times"] == [1000.0, 900.0, 750.0, 500.0, 0.0]
    clips = DigitClips("test", frames=6, seed=5)
    assert [store[i][1] for i in range(14)] == [clips[i]["prompt"] for i in range(14)]
    noise = Key(seed=5, phase="ode_pairs", samples=tuple(range(14))).normal("noise", (6, 4, 8, 8))
    model = WanModel(read_config(tiny_weights / "teacher.safetensors"))
    model.load_state_dict(load_file(tiny_weights / "teacher.safetensors"))
    values = {
        "noise": noise,
        "prompt_embeds": embed_prompts([store[i][1] for i in range(14)]),
        "negative_embeds": embed_prompts([""] * 14),
    }
    with torch.no_grad():
        for steps, state in ((8, 4), (2, None)):
            graph = Graph.from_spec("specs/sample_ode.yaml", steps=steps, shift=3.0, guidance=2.0)
            x0 = graph.run(values, {"denoiser": Port(model, None)})["x0"]
            if state is not None:
                found = torch.stack([store[i][0] for i in range(14)])
                torch.testing.assert_close(found[:, 0], noise.half().float(), rtol=0, atol=0)
                torch.testing.assert_close(found[:, state], x0, rtol=2e-3, atol=2e-3)
            else:
                assert (found[:, 4] - x0).abs().max() > 0.05


def test_the_batch_does_not_matter(recipe, tmp_path):
    for batch in (1, 2, 4):
        prepare_recipe(recipe(f"by_{batch}"), [f"data.with.batch={batch}"])
    stores = [LatentStore.open(tmp_path / f"by_{batch}") for batch in (1, 2, 4)]
    for i in range(14):
        values = [store[i][0] for store in stores]
        torch.testing.assert_close(values[0], values[1], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(values[0], values[2], rtol=2e-3, atol=2e-3)


def test_more_pairs_later_are_those_of_one_run(recipe, tmp_path):
    prepare_recipe(recipe("once"))
    for count in (1, 7, 14):
        prepare_recipe(recipe("grown"), [f"data.with.count={count}"])
        assert len(LatentStore.open(tmp_path / "grown")) == count
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")


def test_a_complete_store_loads_no_teacher(recipe, monkeypatch):
    prepare_recipe(recipe())
    monkeypatch.setattr("sftk.runtime.ode_pairs.build_model", None)
    prepare_recipe(recipe())
    with pytest.raises(TypeError):
        prepare_recipe(recipe(), ["data.with.count=15"])


def test_given_frames_stay_clean(recipe, tmp_path):
    prepare_recipe(recipe("plain"))
    prepare_recipe(recipe("given"), ["data.with.initial_frames=2"])
    plain, given = LatentStore.open(tmp_path / "plain"), LatentStore.open(tmp_path / "given")
    clips = DigitClips("test", frames=6, seed=5)
    for i in range(14):
        states = given[i][0]
        assert all(torch.equal(state[:2], clips[i]["latents"][:2]) for state in states)
        assert torch.equal(states[0, 2:], plain[i][0][0, 2:])
        assert (states[-1, 2:] - plain[i][0][-1, 2:]).abs().max() > 1e-2


@pytest.fixture(scope="module")
def processes():
    """`processes(recipe)`: starts the work in a process of its own, forked from one that has imported everything."""

    def start(recipe, *overrides):
        process = forks().Process(target=prepare_recipe, args=(str(recipe), overrides))
        process.start()
        return process

    return start


def test_killed_at_ten_random_points(recipe, tmp_path, processes):
    many = "data.with.count=80", "data.with.shard=12"
    undisturbed = processes(recipe("undisturbed"), *many)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    rng, there = random.Random(0), [0]
    for _ in range(10):
        process, wanted = processes(recipe("killed"), *many), there[-1] + rng.choice((0, 1, 3))
        while process.is_alive() and pairs_in(tmp_path / "killed") < wanted:
            time.sleep(0.005)
        process.join(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, there
        there.append(pairs_in(tmp_path / "killed"))
    last = processes(recipe("killed"), *many)
    last.join()
    assert last.exitcode == 0
    assert there == sorted(there)
    assert 10 <= there[-1] < 80, there
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def pairs_in(path):
    """Records in all shards; one that was killed early has no header."""
    total = 0
    for folder in path.glob("*"):
        try:
            total += read_header(folder).count
        except DataError:
            continue
    return total


def test_two_processes_against_one(recipe, tmp_path, processes):
    one = processes(recipe("one"))
    one.join()
    both = [processes(recipe("two")) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in (one, *both)] == [0, 0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_claimed_shard_is_left_to_its_owner(recipe, tmp_path):
    """A process that finds a shard taken does the others first, and takes over when the owner dies."""
    folder = tmp_path / "pairs" / "shard_00001"
    folder.mkdir(parents=True)
    with FileLock(folder / "claim.lock"):
        (stage,) = load_recipe(recipe())
        job = pair_job(stage)
        assert job is not None
        reports = []

        class Enough(Exception):
            pass

        def report(done):
            reports.append(done)
            if done == 10 and reports.count(10) > 1:
                raise Enough

        with pytest.raises(Enough):
            make_pairs(job, report)
    assert sorted(job.present().values()) == [0, 2, 4, 4]
    assert make_pairs(job, lambda done: None) == 4


def test_other_settings_are_refused(recipe):
    prepare_recipe(recipe(), ["data.with.count=1"])
    for change, message in (
        ("seed=6", "seed was 5, is now 6"),
        ("solver.guidance=3.0", r"solver was \{'guidance': 2.0"),
        ("keep=[1000, 500, 0]", "hold 5 states, `keep` lists 3"),
    ):
        with pytest.raises((DataError, SpecError), match=message):
            prepare_recipe(recipe(), ["data.with.count=2", f"data.with.{change}"])


def test_errors_of_the_recipe(recipe, tiny):
    for change, message in (
        ("keep=[1000, 990, 0]", r"keep: 1000 and 990 fall on one grid point of a solver with 8 steps; give it more steps"),
        ("keep=[500, 750, 0]", "steps must descend"),
        ("keep=[1000, 500]", r"keep must end with 0, the clean state, found \[1000.0, 500.0\]"),
        ("solver.stepz=3", "solver has no option 'stepz'.*did you mean 'steps'"),
        ("solver.steps=0", "steps must be at least 1, found 0"),
        ("source.use=digitz", "unknown data set 'digitz'"),
        ("text=digitz", "unknown text embedder 'digitz'"),
        ("teacher.weights=none.safetensors", "no such file 'none.safetensors'"),
        ("source=null", "pairs with a `teacher` need `count` and `source`"),
    ):
        with pytest.raises(SpecError, match=message):
            prepare_recipe(recipe(), [f"data.with.{change}"])
    with pytest.raises(
        SpecError, match=r"reads the data set digits, which needs nothing made; expected data: \{use: ode_pairs"
    ):
        prepare_recipe(tiny())


def test_errors_of_the_teacher_and_the_source(recipe):
    with pytest.raises(CheckpointError, match="do not fit the model"):
        prepare_recipe(recipe(), ["data.with.teacher.size=digits"])
    with pytest.raises(
        DataError, match="the teacher takes latents of 4 channels and prompt embeddings of width 16; found 4 in"
    ):
        prepare_recipe(recipe(), ["data.with.teacher.size.text_dim=16"])
    with pytest.raises(DataError, match="the source of ODE pairs has no prompts"):
        prepare_recipe(recipe(), ["data.with.source={use: random, with: {text_len: 4, text_dim: 32}}"])


def test_the_data_set(recipe):
    prepare_recipe(recipe())
    (stage,) = load_recipe(recipe(), ["batch.global=4"])
    batch = next(iter(make_loader(stage.recipe)))
    assert batch["ode_latents"].shape == (4, 5, 6, 4, 8, 8)
    assert torch.equal(batch["latents"], batch["ode_latents"][:, -1])
    assert torch.equal(batch["prompt_embeds"], embed_prompts(batch["prompt"]))
    assert batch["negative_embeds"].abs().max() == 0
    (more,) = load_recipe(recipe(), ["data.with.count=20"])
    with pytest.raises(
        DataError, match="holds 14 ODE pairs, the recipe asks for 20; make the others with `sftk data ode-pairs"
    ):
        make_loader(more.recipe)
    (other,) = load_recipe(recipe(), ["data.with.keep=[1000, 500, 0]"])
    with pytest.raises(DataError, match="hold 5 states, `keep` lists 3"):
        make_loader(other.recipe)


def test_a_run_makes_its_pairs_first_and_lists_what_it_leaves_out(recipe, tmp_path):
    path, console = recipe(), Console(file=io.StringIO(), width=200)
    run = run_recipe(path, ["data.with.count=6", "data.with.codec=digits"], run_dir=tmp_path / "run", console=console)
    assert run.summary.is_file()
    video = load_sampler(run.root).sample(["a 3 moving left"])
    assert video.shape == (1, 6, 16, 16)
    said = console.file.getvalue()
    assert f"{tmp_path}/pairs: making ODE pairs 1 to 6, 8 steps, kept at 1000, 900, 750, 500, 0\nODE pairs" in said
    assert "6 ODE pairs, 6 of them made now" in said
    close_environments()
    with lmdb.open(str(tmp_path / "pairs" / "shard_00001")) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"prompts_0_data")
    console = Console(file=io.StringIO(), width=200)
    run_recipe(path, ["data.with.count=6", "data.with.skip_bad=true"], run_dir=tmp_path / "again", console=console)
    said = console.file.getvalue()
    assert "all 6 ODE pairs are there" in said
    assert "shard_00001, record 0: the key prompts_0_data is missing" in said
    assert "1 left out of the data" in said


def test_weights_are_told_apart_by_folder_and_entry(tmp_path):
    folder = tmp_path / "wan"
    folder.mkdir()
    file = folder / "diffusion_pytorch_model-00001-of-00001.safetensors"
    file.write_bytes(b"a")
    first = file_digest(str(folder))
    assert first.startswith("wan ")
    file.write_bytes(b"b")
    assert file_digest(str(folder)) != first
    (tmp_path / "m.pt").write_bytes(b"a")
    whole, one, other = (file_digest(f"{tmp_path / 'm.pt'}{entry}") for entry in ("", ":generator", ":critic"))
    assert len({whole, one, other}) == 3
