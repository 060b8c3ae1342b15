"""Weights out, and what others make of them."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file

from sftk.errors import CheckpointError
from sftk.models import WanModel, preset
from sftk.models.export import export_weights
from sftk.models.formats import open_weights
from sftk.models.weights import build_model, save_weights

transformers = pytest.importorskip("diffusers.models.transformers.transformer_wan")

HEAD = 16


def shallow(name: str, layers: int, head: int | None = HEAD):
    """A published size, shallow and, with `head`, with narrower heads: heads, channels and proportions stay."""
    config = preset(name)
    if head is None:
        return attrs.evolve(config, num_layers=layers)
    narrow = head / config.head_dim
    return attrs.evolve(
        config,
        dim=config.num_heads * head,
        ffn_dim=round(config.ffn_dim * narrow),
        num_layers=layers,
        text_dim=32,
        freq_dim=16,
    )


def randomise(model: WanModel) -> WanModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if "norm" in name or name.endswith("bias") else parameter.shape[-1] ** -0.5
            parameter.normal_(generator=generator).mul_(scale).add_("norm" in name)
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_round_trip(config, folder: Path, wan_folder) -> None:
    """Original -> ours -> diffusers -> ours -> original, and the same flow on the way."""
    model = randomise(WanModel(config))
    start = wan_folder(folder / "original", model, shards=2, model_type="ti2v" if config.in_dim == 48 else "t2v")
    source = open_weights(start)
    assert source.config() == config
    export_weights(source, folder / "pipeline" / "transformer", format="diffusers", shard_bytes=source.bytes // 3)
    assert len(list((folder / "pipeline" / "transformer").glob("*.safetensors"))) > 2
    theirs, about = transformers.WanTransformer3DModel.from_pretrained(
        folder / "pipeline", subfolder="transformer", output_loading_info=True
    )
    assert not any(about.values()), about
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2, config.in_dim, 4, 6, generator=generator)
    embeds, times = torch.randn(1, 512, config.text_dim, generator=generator), torch.tensor([625.25])
    with torch.no_grad():
        expected = theirs.eval()(latents.transpose(1, 2), times, embeds, return_dict=False)[0].transpose(1, 2)
        found = model(latents, times, embeds)[0]
    assert expected.std() > 0.1
    assert (found - expected).norm() < 1e-5 * expected.norm()
    theirs.save_pretrained(folder / "theirs", max_shard_size="100KB")
    back = open_weights(folder / "theirs")
    assert (back.format, back.config()) == ("diffusers", config)
    again = build_model(
        back.config(), weights=folder / "theirs", seed=0, dtype="fp32", backend="auto", device=torch.device("cpu")
    )
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    export_weights(back, folder / "back", format="original")
    before, after = weights(start), weights(folder / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    mine, public = (json.loads((folder / name / "config.json").read_text()) for name in ("back", "original"))
    del public["_diffusers_version"]
    assert mine == public


@pytest.mark.parametrize("name", ["1.3b", "14b", "5b"])
def test_round_trip(name, tmp_path, wan_folder):
    check_round_trip(shallow(name, layers=2), tmp_path, wan_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1.3b", "14b", "5b"])
def test_round_trip_at_real_widths(name, tmp_path, wan_folder):
    check_round_trip(shallow(name, layers=1, head=None), tmp_path, wan_folder)


def test_dtype_shards_and_index(make_wan, tmp_path):
    model = make_wan(num_layers=3)
    save_weights(model, tmp_path / "ours.safetensors")
    source = open_weights(tmp_path / "ours.safetensors")
    limit = 12_000
    files = export_weights(source, tmp_path / "out", format="original", dtype=torch.bfloat16, shard_bytes=limit)
    assert [file.name for file in files] == [
        f"diffusion_pytorch_model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in state.values())
    for file in files:
        part = load_file(file)
        assert dict.fromkeys(part, file.name) == {n: f for n, f in index["weight_map"].items() if f == file.name}
        assert sum(tensor.nbytes for tensor in part.values()) <= limit
        assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in part.items())
    assert index["weight_map"].keys() == state.keys()
    assert open_weights(tmp_path / "out").config() == model.config


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(make_wan, tmp_path):
    save_weights(make_wan(), tmp_path / "ours.safetensors")
    source = open_weights(tmp_path / "ours.safetensors")
    assert len(export_weights(source, tmp_path / "out", format="original", shard_bytes=1)) == len(source.stored)
    assert open_weights(tmp_path / "out").shapes == source.shapes


def test_to_our_own_format(make_wan, wan_folder, tmp_path):
    model = make_wan()
    folder = wan_folder(tmp_path / "wan", model, shards=2)
    export_weights(open_weights(folder), tmp_path / "deep" / "ours.safetensors", format="sftk")
    found = open_weights(tmp_path / "deep" / "ours.safetensors")
    assert (found.format, found.config()) == ("sftk", model.config)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.tensors())
    with pytest.raises(
        CheckpointError, match=r"is a folder; the sftk format is one file: name it, such as .*model\.safetensors"
    ):
        export_weights(found, tmp_path / "deep", format="sftk")


@pytest.mark.parametrize(
    ("changes", "what"), [({"rope_base": 100.0}, "rope_base 100"), ({"interval_embedding": True}, "interval_embedding")]
)
@pytest.mark.parametrize("format", ["original", "diffusers"])
def test_what_a_format_cannot_tell_is_refused(make_wan, tmp_path, changes, what, format):
    save_weights(make_wan(**changes), tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match=rf"the {format} format has no place for {what}; take --format sftk"):
        export_weights(open_weights(tmp_path / "ours.safetensors"), tmp_path / "out", format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.safetensors"]


def test_nothing_is_overwritten_and_an_empty_folder_is_taken(make_wan, tmp_path):
    save_weights(make_wan(), tmp_path / "ours.safetensors")
    source = open_weights(tmp_path / "ours.safetensors")
    (tmp_path / "out").mkdir()
    export_weights(source, tmp_path / "out", format="original")
    with pytest.raises(CheckpointError, match="out exists already; remove it, or name a new folder"):
        export_weights(source, tmp_path / "out", format="diffusers")
    assert open_weights(tmp_path / "out").format == "original"
