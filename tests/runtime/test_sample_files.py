"""`sftk sample` of a bare recipe with weights in the public formats: which are taken, and what is said when they cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from sftk.cli import main
from sftk.runtime.inference import load_sampler
from sftk.spec.files import search_roots

FOLDER = "wan_models/Wan2.1-T2V-1.3B"
SIZES = {"in_dim": 16, "out_dim": 16, "text_dim": 16}
WRITTEN = "{dim: 24, ffn_dim: 32, num_heads: 2, num_layers: 2, in_dim: 16, out_dim: 16, freq_dim: 16, text_dim: 16}"


def sample(*arguments: str, code: int = 0) -> str:
    given = ["sample", "mine.yaml", "--prompt", "a fox", "--seed", "3", "--out", "a.safetensors", *arguments]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def latents(*arguments: str) -> torch.Tensor:
    sample(*arguments)
    return load_file("a.safetensors")["latents"]


@pytest.fixture
def home(wan_home) -> Path:
    """The download, with the sizes written out in the recipe."""
    recipe = wan_home / "mine.yaml"
    recipe.write_text(recipe.read_text().replace("size: auto", f"size: {WRITTEN}"))
    return wan_home


@pytest.fixture
def published(home, make_wan) -> Path:
    """The same weights as a training checkpoint, beside an average of others."""
    own, average = make_wan(**SIZES).state_dict(), make_wan(seed=4, **SIZES).state_dict()
    entries = {
        "generator": {f"model.{name}": tensor for name, tensor in own.items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in average.items()},
    }
    torch.save(entries, home / "self_forcing_dmd.pt")
    return home


def test_every_format_makes_the_same_video(published):
    wanted = latents()
    assert wanted.shape == (3, 16, 4, 4)
    assert torch.equal(latents("--weights", FOLDER), wanted)
    assert torch.equal(latents("--weights", "self_forcing_dmd.pt:generator"), wanted)
    assert not torch.equal(latents("--weights", "self_forcing_dmd.pt"), wanted)
    for form in ("diffusers", "original", "sftk"):
        done = CliRunner().invoke(main, ["export", FOLDER, f"out_{form}", "--format", form])
        assert done.exit_code == 0, done.output
        made = Path(f"out_{form}")
        assert torch.equal(latents("--weights", str(made if made.exists() else made.with_suffix(".safetensors"))), wanted), form


def test_pictures_come_through_the_downloaded_vae(home):
    said = json.loads(sample("--out", "a.mp4", "--role", "real_score", "--json"))
    assert (said["videos"][0]["frames"], said["sampling"]["shift"], said["sampling"]["guidance"]) == (9, 8.0, 6.0)
    assert Path(said["weights"]) == home / FOLDER


def test_a_folder_says_its_own_size(home, make_wan, wan_folder):
    """As the 14B model does in a recipe for the 1.3B one."""
    wan_folder(home / "larger", make_wan(num_layers=3, dim=48, num_heads=4, **SIZES))
    config = load_sampler("mine.yaml", weights=Path("larger")).port.module.config
    assert (config.dim, config.num_layers, config.num_heads) == (48, 3, 4)
    assert latents("--weights", "larger").isfinite().all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nothing.pt", "no weight file nothing.pt; expected a .safetensors or .pt file, or the folder of a transformer"),
        ("nowhere", "no weight file nowhere; expected a .safetensors or .pt file, or the folder of a transformer"),
        ("prompts.txt", "prompts.txt is no weight file; expected a .safetensors or .pt file"),
        (
            "self_forcing_dmd.pt:critic",
            "no entry 'critic' of tensors, but the entries generator, generator_ema; expected one of",
        ),
        (
            f"{FOLDER}/Wan2.1_VAE.pth",
            "Wan2.1_VAE.pth holds decoder.conv1.weight, a key of a VAE; name the transformer of a Wan",
        ),
        (
            "wan_models",
            "wan_models holds no diffusion_pytorch_model*.safetensors, only Wan2.1-T2V-1.3B/; name one of Wan2.1-T2V",
        ),
    ],
)
def test_weights_that_cannot_be_taken(published, weights, message):
    assert message in sample("--weights", weights, code=1)


def test_a_checkpoint_of_another_size_says_both(home, make_wan):
    torch.save({"generator": make_wan(num_layers=3, **SIZES).state_dict()}, "larger.pt")
    said = sample("--weights", "larger.pt", code=1)
    assert "do not fit the model:\n  unexpected: blocks.2.modulation [1, 6, 24]\n" in said
    assert said.endswith("of another size, num_layers 3, and the model has num_layers 2: name others, or write size: auto\n")


def test_encoders_that_are_not_here(home):
    shutil.move(FOLDER, "there")
    download = f"download it: hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {FOLDER}\n"
    assert sample(code=1).endswith(f"are not here yet; {download}")
    assert sample("--weights", "there", code=1) == f"error: {FOLDER} (text) is not here; {download}"
    assert sample("--weights", "there", "text.with.path=there", "--out", "a.mp4", code=1) == (
        f"error: {FOLDER} (codec) is not here; {download}"
    )
    both = ("text.with.path=there", "codec.with.path=there")
    assert latents("--weights", "there", *both).shape == (3, 16, 4, 4)
    said = sample("--weights", "there", "text.with.path=there", "codec.with.path=somewhere", code=2)
    assert "no such file 'somewhere' @ $.codec.with.path; looked in " in said
    assert str(search_roots()[0]) in said
    shutil.rmtree("there/google")
    assert "missing tokenizer: none of " in sample("--weights", "there", *both, code=1)
