"""Attention's benchmark: shapes, reference, choice of the fastest and where it is kept."""

from __future__ import annotations

import functools
import importlib
import json
import re

import attrs
import pytest
import torch
from click.testing import CliRunner

from sftk.cli import main
from sftk.functional.attention import attention, attention_mask, automatic, set_auto
from sftk.functional.attention_spans import Spans
from sftk.functional.layout import Layout
from sftk.models import preset
from sftk.models.pass_kind import PassKind
from sftk.runtime import attention_auto, attention_choice
from sftk.runtime.attention_auto import settle_attention
from sftk.runtime.attention_choice import Choice, choice_file, choose, find_choice, save_choice, use_choice
from sftk.runtime.attention_errors import reference, relative_errors
from sftk.runtime.attention_shapes import Heads, Shape, model_shapes
from sftk.runtime.bench_attention import MOST_EXACT, attention_lines, bench_attention
from sftk.runtime.device import set_precision
from sftk.spec.recipe import load_recipe
from sftk.spec.schema import LatentsSection

attention_module = importlib.import_module("sftk.functional.attention")  # its package has a function of that name
CPU = torch.device("cpu")
CAUSAL = Shape(
    name="block_causal", queries=12, keys=12, layout=Layout(kind="block_causal", blocks=(1, 2, 3)), tokens_per_frame=2
)


def test_shapes_of_a_model():
    (stage,) = load_recipe("benchmarks/dmd_1.3b.yaml")
    recipe = stage.recipe
    heads, shapes = model_shapes(
        recipe.models["generator"].config, recipe.latents, batch=recipe.batch.split()[0], precision=recipe.precision
    )
    assert heads == Heads(batch=1, heads=12, head_dim=128, dtype=torch.bfloat16)
    by_name = {shape.name: shape for shape in shapes}
    assert list(by_name) == ["full", *(f"cached {i}" for i in range(7)), "block_causal", "cross", "cross block"]
    assert (by_name["cached 6"].queries, by_name["cached 6"].keys) == (4680, 32760)
    assert by_name["cross"].pairs == 32760 * 512
    assert by_name["cross block"].pairs == 4680 * 512
    assert by_name["block_causal"].pairs == 4680**2 * 28
    assert by_name["full"].pairs == 32760**2


@pytest.mark.parametrize("shape", [Shape(name="cross", queries=7, keys=5), CAUSAL], ids=lambda shape: shape.name)
@pytest.mark.parametrize("chunk", [3, 100])
def test_the_reference_is_attention(shape, chunk):
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = (
        torch.randn(2, tokens, 2, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for tokens in (shape.queries, shape.keys, shape.keys, shape.queries)
    )
    mask = attention_mask(shape.layout, shape.tokens_per_frame, CPU, "math")
    out = attention(q, k, v, mask=mask, backend="math")
    expected = (out, *torch.autograd.grad(out, (q, k, v), cotangent))
    for ours, exact in zip(reference(q, k, v, cotangent, shape, chunk), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_every_backend_is_measured_and_exact(monkeypatch):
    heads = Heads(batch=1, heads=2, head_dim=8, dtype=torch.float32)
    there = ("sdpa", "math", "flex", "sdpa_cudnn")  # the last one needs CUDA
    monkeypatch.setattr("sftk.runtime.bench_attention.available_backends", lambda: there)
    report = bench_attention(heads, [Shape(name="full", queries=12, keys=12), CAUSAL], CPU, repeats=1)
    rows = {(row["shape"], row["backend"]): row for row in report["rows"]}
    assert list(rows) == [
        *(("full", name) for name in ("sdpa", "math")),
        *(("block_causal", name) for name in ("sdpa", "spans/sdpa", "math", "spans/math", "flex")),
    ]
    assert max(error for row in rows.values() for error in row["errors"].values()) < 1e-5
    # Two products forward, five backward, of two heads of 8; over all pairs, or those of 2 + 4 + 6 tokens with their past.
    full, causal = rows["full", "math"]["forward"], rows["block_causal", "math"]["training"]
    assert full["tflops"] * full["seconds"] * 1e12 == pytest.approx(2 * 2 * 16 * 12**2)
    assert causal["tflops"] * causal["seconds"] * 1e12 == pytest.approx(7 * 2 * 16 * (2 * 2 + 4 * 6 + 6 * 12))
    assert len(list(attention_lines(report))) == 2 + len(rows)


def test_a_backend_that_fails_leaves_its_error(monkeypatch):
    heads = Heads(batch=1, heads=2, head_dim=8, dtype=torch.float32)
    plain = functools.partial(attention, backend="sdpa_cudnn")
    monkeypatch.setattr("sftk.runtime.bench_attention.candidates", lambda *given: {"sdpa_cudnn": plain})
    report = bench_attention(heads, [Shape(name="full", queries=12, keys=12)], CPU, repeats=1)
    assert report["rows"][0]["error"].startswith("SpecError: the attention backend 'sdpa_cudnn' needs bf16")
    assert "failed: SpecError" in list(attention_lines(report))[2]


def row(shape, backend, forward, training, error=1e-3):
    times = {name: {"seconds": seconds} for name, seconds in (("forward", forward), ("training", training))}
    errors = {"out": error, "q": error}
    queries, keys = TOKENS[shape]
    return {"shape": shape, "queries": queries, "keys": keys, "backend": backend, **times, "errors": errors}


TOKENS = {"full": (32760, 32760), "cached 6": (4680, 32760), "cross": (32760, 512), "block_causal": (32760, 32760)}
FULL = TOKENS["full"]
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def auto():
    """What `auto` takes, by pass and numbers of queries and keys; plain again afterwards."""
    yield lambda *given: {(name, *tokens): automatic(name, *tokens) for name in ("forward", "training") for tokens in given}
    set_auto()


def report_of(*rows):
    return {"device": {"name": H100, "torch": torch.__version__}, "rows": list(rows)}


def test_the_fastest_exact_backend_is_chosen_kept_and_used(tmp_path, monkeypatch, auto):
    monkeypatch.setenv("SFTK_CACHE", str(tmp_path))
    monkeypatch.setattr(attention_choice, "device_name", lambda device: H100)
    rows = [row("full", "sdpa", 3, 9), row("full", "sdpa_cudnn", 2, 7), row("full", "flash", 1, 8), row("full", "x", 0, 0, 1.0)]
    rows += [{"shape": "full", "backend": "math", "error": "OutOfMemoryError"}, row("cross", "sdpa", 1, 1)]
    rows += [row("block_causal", "flex", 1, 2), row("block_causal", "spans/flash", 2, 1)]
    choice = choose(report_of(*rows))
    assert choice.fastest == {
        "full": {"forward": "flash", "training": "sdpa_cudnn"},
        "cross": {"forward": "sdpa", "training": "sdpa"},
        "block_causal": {"forward": "flex", "training": "spans/flash"},
    }
    cuda = torch.device("cuda")
    assert find_choice(cuda) is None
    assert save_choice(choice).parent.parent == tmp_path
    assert find_choice(cuda) == choice
    use_choice(choice, ("sdpa", "sdpa_cudnn", "flash"))
    assert auto((4680, 300), (4680, 4680)) == {
        ("forward", 4680, 300): "sdpa",
        ("forward", 4680, 4680): "flash",  # nearer to 32760 than to 512, by its ratio
        ("training", 4680, 300): "sdpa",
        ("training", 4680, 4680): "sdpa_cudnn",
    }
    use_choice(choice, ("sdpa", "sdpa_cudnn"))  # flash is gone
    assert auto(FULL) == {("forward", *FULL): "sdpa", ("training", *FULL): "sdpa_cudnn"}
    file, earlier = choice_file(choice.device, choice.torch), attrs.asdict(choice)
    earlier.pop("queries")
    for text in ("{", json.dumps(earlier)):  # broken, and of a version that kept the numbers of keys alone
        file.write_text(text)
        assert find_choice(cuda) is None
    use_choice(None)
    assert auto(FULL) == {("forward", *FULL): "sdpa", ("training", *FULL): "sdpa"}


def test_a_pass_over_all_frames_and_a_late_block_differ(auto):
    """They have the same number of keys; training never takes what only calls without gradient have."""
    rows = [row("full", "flash", 1, 2), row("full", "flash_split_kv", 1.02, 1), row("full", "sdpa", 2, 3)]
    rows += [row("cached 6", "flash", 1.09, 1), row("cached 6", "flash_split_kv", 1, 0.5), row("cached 6", "sdpa", 2, 2)]
    rows += [row("cross", "flash", 2, 2), row("cross", "flash_split_kv", 3, 3), row("cross", "sdpa", 1, 1)]
    rows += [row("block_causal", "spans/flash", 1, 2), row("block_causal", "spans/flash_split_kv", 2, 1)]
    choice = choose(report_of(*rows))
    assert choice.fastest == {
        "full": {"forward": "flash", "training": "flash"},
        "cached 6": {"forward": "flash_split_kv", "training": "flash"},
        "cross": {"forward": "sdpa", "training": "sdpa"},
        "block_causal": {"forward": "spans/flash", "training": "spans/flash"},
    }
    use_choice(choice, ("sdpa", "flash", "flash_split_kv"))
    assert auto(FULL, (4680, 28080)) == {
        ("forward", *FULL): "flash",
        ("forward", 4680, 28080): "flash_split_kv",
        ("training", *FULL): "flash",
        ("training", 4680, 28080): "flash",
    }
    shape = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "masked": False}
    block = PassKind(tokens=4680, cached=15 * 1560, **shape)
    whole = PassKind(tokens=32760, cached=0, **shape)
    with torch.no_grad():
        assert block.attention("auto", fp8=False, trains=False) == "flash_split_kv"
        assert whole.attention("auto", fp8=False, trains=False) == "flash"
        assert block.text_attention("auto", 512) == whole.text_attention("auto", 512) == "sdpa"
    assert block.attention("auto", fp8=False, trains=False) == "flash"


def test_what_is_measured_without_gradient_is_exact_there_too():
    """A backend may compute calls without gradient otherwise."""
    trial = torch.randn(4, 1, 12, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    shape = Shape(name="full", queries=12, keys=12)

    def attend(q, k, v):
        return attention(q, k, v) * (1.0 if torch.is_grad_enabled() else 1.5)

    errors = relative_errors(attend, trial, reference(*trial, shape))
    assert errors["out"] == pytest.approx(0.5)
    assert max(errors[name] for name in "qkv") < 1e-5


def test_about_as_fast_is_fast_enough_for_the_one_that_is_taken_elsewhere():
    rows = [row("full", "flash", 1, 1), row("full", "sdpa", 2, 2)]
    rows += [row("cross", "flash", 1.04, 1.2), row("cross", "sdpa", 1, 1)]
    assert choose(report_of(*rows)).fastest["cross"] == {"forward": "flash", "training": "sdpa"}


@pytest.mark.parametrize(
    ("rows", "layouts"),
    [
        ([row("full", "sdpa_cudnn", 1, 1)], "spans"),
        ([row("full", "sdpa", 1, 1)], "flex"),
        ([row("full", "sdpa_cudnn", 1, 1), row("block_causal", "flex", 1, 1)], "flex"),
        ([row("full", "sdpa", 1, 1), row("block_causal", "spans/sdpa_flash", 1, 1)], "spans"),
    ],
)
def test_layouts_go_where_they_were_faster(rows, layouts, auto, monkeypatch):
    use_choice(choose(report_of(*rows)), ("sdpa", "sdpa_cudnn", "sdpa_flash"))
    monkeypatch.setattr(attention_module, "flex_mask", lambda *given: "a mask")  # which needs the device
    mask = attention_mask(CAUSAL.layout, 2, torch.device("cuda"))
    assert isinstance(mask, Spans) == (layouts == "spans")


def test_a_device_is_measured_once(tmp_path, monkeypatch, auto):
    """As on CUDA, with a report instead of a measurement."""
    monkeypatch.setenv("SFTK_CACHE", str(tmp_path))
    monkeypatch.setattr(attention_choice, "device_name", lambda device: H100)
    monkeypatch.setattr(attention_choice, "available_backends", lambda: ("sdpa", "sdpa_cudnn"))
    measured, said = [], []

    def report(heads, shapes, device, repeats):
        measured.append((heads, [shape.name for shape in shapes]))
        return report_of(row("full", "sdpa_cudnn", 1, 1))

    monkeypatch.setattr(attention_auto, "bench_attention", report)
    large, small = (LatentsSection(frames=21, channels=16, height=size, width=size) for size in (60, 4))
    configs, cuda = [preset("1.3b"), preset("14b")], torch.device("cuda")
    settle = functools.partial(settle_attention, say=said.append)
    assert settle(configs, small, "bf16", cuda) is None
    assert settle(configs, large, "fp32", cuda) is None
    assert settle(configs, large, "bf16", CPU) is None
    assert not measured
    choice = settle(configs, large, "bf16", cuda)
    assert choice == settle(configs, large, "bf16", cuda) == settle(configs, small, "fp32", cuda)
    ((heads, shapes),) = measured
    assert (heads.heads, shapes) == (40, ["full", "cached 0", "cached 3", "cached 6", "cross", "cross block"])
    assert len(said) == 1
    assert auto(FULL)["training", *FULL] == "sdpa_cudnn"
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFTK_CACHE", str(tmp_path / "file"))
    assert settle(configs, large, "bf16", cuda) == choice
    assert re.search(r"cannot be kept for later runs: .*file.*; SFTK_CACHE names another folder", said[-1])
    set_precision("fp32")


def test_other_versions_have_files_of_their_own(monkeypatch):
    monkeypatch.delenv("SFTK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(choice_file("NVIDIA L40S", "2.12.0")) == "/somewhere/sftk/attention/NVIDIA-L40S_torch-2.12.0.json"


def test_on_a_cpu_a_choice_changes_nothing():
    set_auto(forward={(1, 1): "flash"}, training={(1, 1): "flash"})
    try:
        x = torch.randn(1, 4, 2, 8, requires_grad=True)
        assert torch.equal(attention(x, x, x), attention(x, x, x, backend="sdpa"))
    finally:
        set_auto()


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SFTK_CACHE", str(tmp_path / "kept"))
    file = tmp_path / "report.json"
    options = ["--only", "cross,cached", "--steps", "1", "--json", str(file), "--save"]
    small = ["batch.global=1", "latents.frames=6", "device=cpu"]
    run = CliRunner().invoke(main, ["bench", "attention", "recipes/digits/df.yaml", *small, *options])
    assert run.exit_code == 0, run.output
    assert [row["shape"] for row in json.loads(file.read_text())["rows"]] == [
        name for name in ("cached 0", "cached 1", "cross", "cross block") for _ in range(2)
    ]
    (kept,) = (tmp_path / "kept" / "attention").iterdir()
    assert Choice(**json.loads(kept.read_text())).fastest.keys() == {"cached 0", "cached 1", "cross", "cross block"}
    wrong = CliRunner().invoke(main, ["bench", "attention", "--only", "ful"])
    assert (wrong.exit_code, "there is no shape 'ful', only full, cached" in wrong.output) == (2, True)


def test_errors_are_found_at_a_shape_that_the_reference_can_hold():
    full, causal = Shape(name="full", queries=32760, keys=32760), attrs.evolve(CAUSAL, tokens_per_frame=1560)
    assert full.shrunk(MOST_EXACT).pairs == MOST_EXACT**2
    assert causal.shrunk(MOST_EXACT).tokens_per_frame == MOST_EXACT // 6
    assert CAUSAL.shrunk(MOST_EXACT) == CAUSAL
