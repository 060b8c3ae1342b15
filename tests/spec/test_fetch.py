"""Files that a recipe downloads: accepted under their exact names, and only there."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from sftk.cli import main
from sftk.errors import CheckpointError, DataError, SpecError
from sftk.runtime import download as downloading
from sftk.runtime.build import weights_file
from sftk.runtime.prepare import prepare_data
from sftk.runtime.progress import TrainingProgress
from sftk.spec.fetch import missing_files, recipe_files
from sftk.spec.files import find_file
from sftk.spec.recipe import load_recipe

RECIPE = "recipes/wan-1.3b/dmd.yaml"
INIT = "wan_models/self_forcing/checkpoints/ode_init.pt"
PROMPTS = "prompts/vidprom_filtered_extended.txt"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_is_not_here_is_named_with_its_users():
    (stage,) = load_recipe(RECIPE)
    missing = {file.name: file.used_by for file in missing_files(stage)}
    assert missing == {
        INIT: ("models.generator",),
        "wan_models/Wan2.1-T2V-1.3B": (
            "models.real_score", "models.fake_score", "sample.text.with.path", "sample.codec.with.path",
        ),
        PROMPTS: ("data.with.path",),
        "data/vidprom_embeds": ("data.with.text.with.path",),
    }  # fmt: skip
    output = CliRunner().invoke(main, ["check", RECIPE]).output
    assert f"not here yet: {INIT} (models.generator); download it: hf download gdhe17/Self-Forcing checkpoints/" in output
    assert "not here yet: data/vidprom_embeds (data.with.text.with.path); make it: sftk data embed prompts/" in output


def test_what_is_here_is_found(tmp_path):
    (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B").mkdir(parents=True)
    (stage,) = load_recipe(RECIPE)
    assert [file.name for file in missing_files(stage)] == [INIT, PROMPTS, "data/vidprom_embeds"]
    assert [file.path is not None for file in recipe_files(stage)] == [False, True, False, False]
    downloads, embed = CliRunner().invoke(main, ["fetch", RECIPE]).output.split("sftk data embed ")
    whole = f"{tmp_path}/wan_models/Wan2.1-T2V-1.3B holds no diffusion_pytorch_model*.safetensors, only nothing"
    assert downloads == (
        f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B  # here, but {whole}\n"
        "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir wan_models/self_forcing\n"
        "hf download gdhe17/Self-Forcing vidprom_filtered_extended.txt --local-dir prompts\n"
    )
    assert embed.startswith(f"{PROMPTS} data/vidprom_embeds --first 46080 --text ")


@pytest.mark.parametrize("name", ["wan_models/Wan2.1-T2V-1.3b", "wan_models/Wan2.1-T2V-1.3B/model.pt", f"{INIT}h"])
def test_a_misspelt_name_is_an_error_still(name):
    with pytest.raises(SpecError, match=r"no such file .* @ \$.models.fake_score.weights"):
        load_recipe(RECIPE, [f"models.fake_score.weights={name}"])


def test_a_download_that_nothing_names_is_an_error():
    with pytest.raises(SpecError, match=r"nothing in this recipe names 'wan_models/Wan2.1-T2V-1.3B'.*@ \$.fetch"):
        load_recipe(RECIPE, ["models.real_score.weights=null", "models.fake_score.weights=null", "sample={}"])


def test_a_run_asks_for_the_download():
    (stage,) = load_recipe(RECIPE)
    with pytest.raises(CheckpointError, match=r"ode_init.pt' of models.generator are not here yet; download it: hf download"):
        weights_file(stage.recipe.models["generator"], stage, {})
    with pytest.raises(
        DataError, match=r"(?s)ode_init.pt .*\n.*Wan2.1-T2V-1.3B .*\n.*vidprom_filtered_extended.txt .*\n.*embeds "
    ):
        prepare_data(stage, TrainingProgress(enabled=False))


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
        ("gdhe17/Self-Forcing", {"local_dir": "prompts", "allow_patterns": ["vidprom_filtered_extended.txt"]}),
    ]


def test_downloading_without_the_library_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(downloading.importlib, "import_module", missing)
    first, *_ = downloading.downloads(load_recipe(RECIPE))
    with pytest.raises(DataError, match="pip install huggingface_hub"):
        downloading.run_download(first)


def test_nothing_to_download():
    assert CliRunner().invoke(main, ["fetch", "recipes/dmd.yaml"]).output == "nothing to download\n"


def test_what_only_its_user_has_is_asked_for():
    output = CliRunner().invoke(main, ["fetch", "recipes/wan-1.3b/i2v.yaml", "--all"]).output
    assert "\n# data/images: pictures with captions, see docs/data.md\n" in output
    output = CliRunner().invoke(main, ["doctor", "recipes/wan-1.3b/i2v.yaml", "latents.frames=3"]).output
    assert "data/images (data.with.path)" in output
    assert "put it there: pictures with captions" in output


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{}", "files come from one of `repo`, `command` and `own`"),
        ("{repo: a/b, own: mine}", "files come from one of `repo`, `command` and `own`"),
        ("{command: make, files: [a.pt]}", "`files` are those of a `repo`"),
    ],
)
def test_a_fetch_says_one_thing(section, expected):
    with pytest.raises(SpecError, match=expected):
        load_recipe(RECIPE, [f"fetch.prompts={section}"])


def test_files_of_options_are_found_beside_the_recipe(tmp_path):
    """Text embedders, codecs, stores and the data sets inside them: as weights are, and whole in a run's recipe.yaml."""
    folder = tmp_path / "mine"
    for name in ("embeds", "vae", "images"):
        (folder / name).mkdir(parents=True)
    text = find_file("recipes/wan-1.3b/i2v.yaml").read_text()
    for name in ("images_embeds", "images"):
        text = text.replace(f"path: data/{name}", f"path: {name.replace('images_', '')}")
    text = text.replace("{path: wan_models/Wan2.1-T2V-1.3B}}\nmodels", "{path: vae}}\nmodels").split("  data/images:")[0]
    (folder / "r.yaml").write_text(text + "precision: bf16\n")
    (stage,) = load_recipe(folder / "r.yaml")
    options = stage.resolved["data"]["with"]
    assert options["text"]["with"]["path"] == str(folder / "embeds")
    assert options["codec"]["with"]["path"] == str(folder / "vae")
    assert options["path"] == str(folder / "images")
    (folder / "embeds").rmdir()
    with pytest.raises(SpecError, match=r"no such file 'embeds' @ \$.data.with.text.with.path"):
        load_recipe(folder / "r.yaml")


def test_a_codec_role_is_checked_and_found(tmp_path):
    long = "recipes/wan-1.3b/dmd_long.yaml"
    with pytest.raises(SpecError, match=r"no such file 'vae.pth' @ \$.models.codec.codec.with.path"):
        load_recipe(long, ["models.codec.codec.with.path=vae.pth"])
    with pytest.raises(SpecError, match=r"makes latents of 48 channels, the recipe has 16 @ \$.models.codec.codec"):
        load_recipe(long, ["models.codec.codec.with.channels=48"])
    with pytest.raises(SpecError, match=r"unknown codec 'wan_vea'.*did you mean 'wan_vae'"):
        load_recipe(long, ["models.codec.codec.use=wan_vea"])
    with pytest.raises(SpecError, match=r"'codec' is a codec and never changes"):
        load_recipe(long, ["ema.codec={decay: 0.9}"])
    with pytest.raises(SpecError, match=r"a codec comes as it is, without `weights`"):
        load_recipe(long, ["models.codec.dtype=bf16"])
    (tmp_path / "vae.pth").write_bytes(b"")
    (stage,) = load_recipe(long, ["models.codec.codec.with.path=vae.pth"])
    assert stage.resolved["models"]["codec"]["codec"]["with"]["path"] == str(tmp_path / "vae.pth")
