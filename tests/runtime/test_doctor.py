"""`sftk doctor` and `sftk fetch` on a tiny download in Wan's own files: what training reads, what only sampling reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from sftk.cli import main

FOLDER = Path("wan_models/Wan2.1-T2V-1.3B")
STEM = "diffusion_pytorch_model"
DOWNLOAD = f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {FOLDER}"
SIZES = "{dim: 24, ffn_dim: 32, num_heads: 2, num_layers: 2, in_dim: 16, out_dim: 16, freq_dim: 16, text_dim: 16}"


def said(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def write_sizes(recipe: Path) -> None:
    """The sizes written out, so that a recipe is read where its weights cannot be."""
    recipe.write_text(recipe.read_text().replace("size: auto", f"size: {SIZES}"))


def test_a_whole_download(wan_home):
    found = said("doctor", "mine.yaml")
    assert re.search(rf"ok +{FOLDER} \(models.generator, .*, sample.text.with.path, sample.codec.with.path\): 0.001 GiB", found)
    for reader in ("models.generator", "data.with.text", "sample.text, only to sample", "sample.codec, only to sample"):
        assert re.search(rf"ok +{reader}: \d+\.\d M weights, which fit", found)
    assert said("fetch", "mine.yaml") == "nothing to download\n"


def test_files_of_their_own_that_only_sampling_reads(wan_home):
    text = Path("mine.yaml").read_text()
    mine, sample = text.split("sample:\n")
    sample = sample.replace(f"{FOLDER}, device", "vae, device").replace("fetch: {", "fetch: {vae: {repo: Wan-AI/vae}, ")
    Path("mine.yaml").write_text(f"{mine}sample:\n{sample}")
    found = said("doctor", "mine.yaml")
    assert re.search(r"note +vae \(sample.codec.with.path\), only to sample: not here\n +download it: hf download", found)
    assert said("fetch", "mine.yaml") == "hf download Wan-AI/vae --local-dir vae  # only to sample\n"
    assert "not here yet" not in said("check", "mine.yaml")
    assert "finished: " in said("run", "mine.yaml")
    expected = "error: vae (codec) is not here; download it: hf download Wan-AI/vae --local-dir vae\n"
    assert said("sample", "mine.yaml", "--prompt", "a fox", code=1) == expected
    shutil.move(FOLDER / "Wan2.1_VAE.pth", "vae.pth")
    Path("vae").mkdir()
    shutil.move("vae.pth", "vae/Wan2.1_VAE.pth")
    assert said("fetch", "mine.yaml") == "nothing to download\n"
    assert "a.mp4: a fox (9 frames" in said("sample", "mine.yaml", "--prompt", "a fox", "--out", "a.mp4")


def test_a_download_without_the_vae_trains_and_does_not_sample(wan_home):
    (FOLDER / "Wan2.1_VAE.pth").unlink()
    found = said("doctor", "mine.yaml")
    lacks = (
        f"no VAE at {wan_home / FOLDER}, which holds only config.json, diffusion_pytorch_model.safetensors, google/, models_t5"
    )
    assert f"note    sample.codec, only to sample: {lacks}" in found
    assert said("fetch", "mine.yaml").startswith(f"{DOWNLOAD}  # here, but {lacks}")
    assert said("sample", "mine.yaml", "--prompt", "a fox", code=1).startswith(f"error: {lacks}")
    assert "finished: " in said("run", "mine.yaml")


def remove_tokenizer() -> None:
    shutil.rmtree(FOLDER / "google")


def truncate_weights() -> None:
    file = FOLDER / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:-300])


def truncate_text_encoder() -> None:
    file = FOLDER / "models_t5_umt5-xxl-enc-bf16.pth"
    file.write_bytes(file.read_bytes()[:-300])


def take_image_to_video() -> None:
    file = FOLDER / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "i2v"}))


def take_another_size() -> None:
    Path("mine.yaml").write_text(Path("mine.yaml").read_text().replace("num_layers: 2", "num_layers: 3"))


def take_another_folder() -> None:
    shutil.rmtree(FOLDER)
    (FOLDER / "cats").mkdir(parents=True)


def mix_shards() -> None:
    from safetensors.torch import save_file

    weights = load_file(FOLDER / f"{STEM}.safetensors")
    first, *others = sorted(weights)
    (FOLDER / f"{STEM}.safetensors").unlink()
    save_file({first: weights[first]}, FOLDER / f"{STEM}-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in (first, *others)}, FOLDER / f"{STEM}-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (remove_tokenizer, "data.with.text", r"missing tokenizer: none of .*umt5-xxl holds tokenizer.json or .*; download"),
        (truncate_weights, "models.generator", rf"{STEM}\.safetensors is not a whole .*truncated, \d+ bytes of \d+; copy it"),
        (truncate_text_encoder, "data.with.text", r"bf16\.pth is not a whole PyTorch file: it is truncated .*; copy it again"),
        (take_image_to_video, "models.generator", r"config\.json says model_type: 'i2v'; expected t2v or ti2v: name the"),
        (take_another_size, "models.generator", r"do not fit the model:\n +missing: blocks.2"),
        (take_another_folder, "models.generator", rf"holds no {STEM}\*\.safetensors, only cats/; name the folder of a Wan"),
        (mix_shards, "models.generator", r"blocks.*is in two shards of .*00001-of-00002\.safetensors and .*: copy the folder"),
    ],
)
def test_what_is_broken_is_said_alike_before_a_run_and_by_it(wan_home, change, place, message):
    write_sizes(wan_home / "mine.yaml")
    change()
    assert re.search(rf"missing +{re.escape(place)}: (the weights in )?\S*.*{message}", said("doctor", "mine.yaml", code=1))
    for command in (("run", "mine.yaml"), ("sample", "mine.yaml", "--prompt", "a fox")):
        assert re.search(rf"error: .*{message}", said(*command, code=1))
    assert said("fetch", "mine.yaml").startswith(f"{DOWNLOAD}  # here, but ")


def test_a_size_that_is_not_here_yet_says_how_to_get_it(wan_home):
    shutil.rmtree(FOLDER)
    found = said("fetch", "mine.yaml", code=2)
    assert f"which is not here yet @ $.models.generator.size (mine.yaml:8); name a size, or download it: {DOWNLOAD}" in found


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (["parallel.sequence=3"], " of 3"),
        (["parallel={shard: 4, sequence: 3}", "batch.per_rank=5", "batch.global=60"], " of 12"),
        (["parallel.shard=node", "models.real_score.parallel.shard=2"], " of 2"),
        ([], ""),
    ],
)
def test_ranks_that_a_recipe_shares_its_weights_over(overrides, ranks):
    """One rank of the fewest that the recipe takes is planned, whatever the batch."""
    found = said("doctor", "recipes/dmd.yaml", *overrides)
    assert re.search(rf"memory: one rank{ranks} needs about 0\.\d GiB", found)
