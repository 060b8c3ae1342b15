"""`size: auto`: the size that the weights have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sftk.errors import SpecError
from sftk.models import WanModel, preset
from sftk.models.weights import save_weights
from sftk.runtime.build import construct
from sftk.spec.recipe import load_recipe
from sftk.spec.sizes import written_size


def problems(overrides: list[str]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_recipe("recipes/dmd.yaml", overrides)
    return [str(problem) for problem in caught.value.problems]


def test_the_size_of_the_weights_is_put_in_place_and_written_down():
    (stage,) = load_recipe("recipes/dmd.yaml", ["models.generator.size=auto"])
    assert stage.recipe.models["generator"].size == preset("digits")
    written = stage.resolved["models"]["generator"]["size"]
    assert written["dim"] == 96
    assert written == written_size(preset("digits"))
    assert stage.resolved["models"]["real_score"]["size"] == "digits"
    again = load_recipe(stage.resolved)[0]
    assert again.recipe.models["generator"].config == preset("digits")
    with torch.device("meta"):
        module = construct(stage.recipe, "generator")
    assert isinstance(module, WanModel)
    assert module.config == preset("digits")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["models.generator.size=auto", "models.generator.weights=null"],
            "size: auto is read from `weights`, which this model lacks",
        ),
        (["models.generator.size=auto", "models.generator.weights=assets/digits/inti.safetensors"], "no such file"),
        (
            ["models.generator.size=autom"],
            "unknown model size 'autom', expected one of 1.3b, 14b, 5b, digits, auto or a mapping",
        ),
    ],
)
def test_sizes_that_cannot_be_read(overrides, expected):
    found = problems(overrides)
    assert any(expected in line for line in found), found
    assert all("$.models.generator" in line for line in found)


def test_weights_of_something_else(tmp_path: Path):
    save_file({"down_blocks.0.weight": torch.zeros(2)}, tmp_path / "sdxl.safetensors")
    (found,) = problems(["models.generator.size=auto", f"models.generator.weights={tmp_path / 'sdxl.safetensors'}"])
    assert "holds down_blocks.0.weight, a key of a U-Net" in found
    assert "@ $.models.generator.weights" in found


def test_a_size_that_does_not_suit_the_latents(tmp_path: Path, make_model):
    save_weights(make_model(torch.float32, in_dim=6, text_len=4), tmp_path / "six.safetensors")
    found = problems(["models.generator.size=auto", f"models.generator.weights={tmp_path / 'six.safetensors'}"])
    assert any("the model takes 6 channels, the latents have 4" in line for line in found)


def test_a_download_that_is_not_here_yet():
    value: dict[str, Any] = load_recipe("recipes/dmd.yaml")[0].resolved
    value["fetch"] = {"nowhere/wan": {"repo": "someone/wan"}}
    value["models"]["generator"] |= {"size": "auto", "weights": "nowhere/wan"}
    with pytest.raises(
        SpecError, match=r"the size is read from 'nowhere/wan', which is not here yet .*; name a size, or download it: hf"
    ):
        load_recipe(value)


def test_the_size_of_an_earlier_stage(tmp_path: Path):
    path = tmp_path / "two.yaml"
    path.write_text(
        "version: 1\nstages:\n"
        "  - {name: first, recipe: recipes/digits/teacher.yaml}\n"
        "  - {name: second, recipe: recipes/dmd.yaml, with: {models.real_score: {size: auto, weights: first/denoiser}}}\n"
    )
    first, second = load_recipe(path)
    assert second.recipe.models["real_score"].size == first.recipe.models["denoiser"].size == "digits"
    assert second.resolved["models"]["real_score"]["size"] == "digits"


def test_an_entry_of_a_training_checkpoint_is_found_beside_the_recipe(tmp_path: Path, make_model):
    model = make_model(torch.float32, dim=256, num_heads=2, text_dim=32)
    torch.save({"generator": model.state_dict(), "critic": {"a": torch.zeros(1)}}, tmp_path / "student.pt")
    override = ["models.generator.size=auto", f"models.generator.weights={tmp_path}/student.pt:generator"]
    (stage,) = load_recipe("recipes/dmd.yaml", override)
    assert stage.recipe.models["generator"].config.dim == 256
    assert stage.resolved["models"]["generator"]["weights"] == f"{tmp_path.resolve()}/student.pt:generator"
    found = problems([override[0], override[1].replace("generator", "critic", 2).replace("critic", "generator", 1)])
    assert any("is no Wan transformer" in line or "lacks" in line for line in found), found
