"""Files that a recipe downloads: accepted under their exact names, and only there."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.errors import CheckpointError, DataError, SpecError
from sftk.runtime import download as downloading
from sftk.runtime.build import weights_file
from sftk.spec.fetch import missing_files, recipe_files
from sftk.spec.recipe import load_recipe

RECIPE = "recipes/wan-1.3b/dmd.yaml"
INIT = "wan_models/self_forcing/checkpoints/ode_init.pt"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_is_not_here_is_named_with_its_users():
    (stage,) = load_recipe(RECIPE)
    missing = {file.name: file.used_by for file in missing_files(stage)}
    assert missing == {INIT: ("models.generator",), "wan_models/Wan2.1-T2V-1.3B": ("models.real_score", "models.fake_score")}
    output = CliRunner().invoke(main, ["check", RECIPE]).output
    assert f"not here yet: {INIT} (models.generator)" in output


def test_what_is_here_is_found(tmp_path):
    (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B").mkdir(parents=True)
    (stage,) = load_recipe(RECIPE)
    assert [file.name for file in missing_files(stage)] == [INIT]
    assert [file.path is not None for file in recipe_files(stage)] == [False, True]
    assert CliRunner().invoke(main, ["fetch", RECIPE]).output == (
        "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir wan_models/self_forcing\n"
    )


@pytest.mark.parametrize("name", ["wan_models/Wan2.1-T2V-1.3b", "wan_models/Wan2.1-T2V-1.3B/model.pt", f"{INIT}h"])
def test_a_misspelt_name_is_an_error_still(name):
    with pytest.raises(SpecError, match=r"no such file .* @ \$.models.fake_score.weights"):
        load_recipe(RECIPE, [f"models.fake_score.weights={name}"])


def test_a_download_that_nothing_names_is_an_error():
    with pytest.raises(SpecError, match=r"nothing in this recipe names 'wan_models/Wan2.1-T2V-1.3B'.*@ \$.fetch"):
        load_recipe(RECIPE, ["models.real_score.weights=null", "models.fake_score.weights=null"])


def test_a_run_asks_for_the_download():
    (stage,) = load_recipe(RECIPE)
    with pytest.raises(CheckpointError, match=r"ode_init.pt' of models.generator are not here yet; .*`sftk fetch .*dmd.yaml`"):
        weights_file(stage.recipe.models["generator"], stage, {})


def test_downloads_are_run(monkeypatch):
    calls = []

    class Hub:
        @staticmethod
        def snapshot_download(repo, **options):
            calls.append((repo, options))

    monkeypatch.setattr(downloading.importlib, "import_module", lambda name: Hub)
    assert CliRunner().invoke(main, ["fetch", RECIPE, "--run"]).exit_code == 0
    assert calls == [
        ("Wan-AI/Wan2.1-T2V-1.3B", {"local_dir": "wan_models/Wan2.1-T2V-1.3B", "allow_patterns": None}),
        ("gdhe17/Self-Forcing", {"local_dir": "wan_models/self_forcing", "allow_patterns": ["checkpoints/ode_init.pt"]}),
    ]


def test_downloading_without_the_library_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(downloading.importlib, "import_module", missing)
    (first, _) = downloading.downloads(load_recipe(RECIPE))
    with pytest.raises(DataError, match="pip install huggingface_hub"):
        downloading.run_download(first)


def test_nothing_to_download():
    assert CliRunner().invoke(main, ["fetch", "recipes/dmd.yaml"]).output == "nothing to download\n"
