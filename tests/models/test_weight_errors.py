"""Weights that cannot be used: each message names the file, the key and the fix."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sftk.errors import CheckpointError
from sftk.models.formats import open_weights
from sftk.models.mapped import map_file
from sftk.models.text import load_text_encoder
from sftk.models.vae import find_vae
from sftk.models.weights import load_weights, read_config, read_tensors

STEM = "diffusion_pytorch_model"


def message(path: Path, model: Any = None) -> str:
    """What loading says, without the folder's own name."""
    with pytest.raises(CheckpointError) as caught:
        read_config(path) if model is None else load_weights(model, path)
    return str(caught.value)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(file: Path, drop: tuple[str, ...] = (), **added: torch.Tensor) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name not in drop}
    save_file(tensors | added, file)


def test_a_folder_without_a_transformer(make_wan, wan_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty").endswith(
        "holds no diffusion_pytorch_model*.safetensors, only nothing; name the folder of a Wan 2.1 transformer"
    )
    two = tmp_path / "Wan2.2-T2V-A14B"
    for name in ("high_noise_model", "low_noise_model"):
        wan_folder(two / name, make_wan())
    assert message(two).endswith(
        "only high_noise_model/, low_noise_model/; name one of high_noise_model, low_noise_model in it"
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    assert message(run).endswith("only recipe.yaml; this is a run; name a weight file in its checkpoints/")
    other = tmp_path / "other"
    other.mkdir()
    (other / "self_forcing_dmd.pt").write_bytes(b"")
    assert message(other).endswith(f"to take a file, name it: {other / 'self_forcing_dmd.pt'}")


@pytest.mark.parametrize("name", ["no.safetensors", "no.pt", "no"])
def test_nothing_there(tmp_path, name):
    assert f"no weight file {tmp_path / name}" in message(tmp_path / name)


def test_truncated_files(make_wan, wan_folder, tmp_path):
    folder = wan_folder(tmp_path / "wan", make_wan(), shards=2)
    file = folder / f"{STEM}-00002-of-00002.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2):
        file.write_bytes(whole[:size])
        expected = f"{file} is not a whole safetensors file: it is truncated, {size} bytes of {len(whole)}; copy it again"
        assert message(folder) == expected
    file.write_bytes(whole[:100])
    assert re.search(r"00002-of-00002\.safetensors is not a whole safetensors file: .*; copy it again$", message(folder))
    file.write_bytes(b"")
    assert "not a whole safetensors file" in message(folder)
    torch.save({"generator": make_wan().state_dict()}, tmp_path / "m.pt")
    short = (tmp_path / "m.pt").read_bytes()[:-5000]
    (tmp_path / "m.pt").write_bytes(short)
    whole_end = f"m.pt is not a whole PyTorch file: it is truncated after {len(short)} bytes; copy it again"
    assert message(tmp_path / "m.pt").endswith(whole_end)
    torch.save({"a": torch.zeros(999)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:-100])
    assert re.search(r"old\.pt is not a whole PyTorch file \(\d+ bytes\): .*; copy it again$", message(tmp_path / "old.pt"))


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_pointers_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5676070424\n")
    assert "is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`, or" in message(tmp_path / name)


class Malicious:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_pickles_run_nothing(tmp_path, capsys):
    torch.save({"generator": {"a": torch.zeros(1)}, "args": Malicious()}, tmp_path / "m.pt")
    assert "m.pt holds more than tensors, or is no PyTorch file" in message(tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    assert "save its tensors anew: python -c" in message(tmp_path / "m.pt")
    assert "unpickled" not in capsys.readouterr().out


def test_files_of_old_versions_of_pytorch(make_wan, tmp_path, capsys):
    """Before 1.6 a file was a sequence of pickles, which loads; before 0.1.10 a .tar, which cannot be read as tensors only."""
    tensors = make_wan().state_dict()
    torch.save(tensors, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert map_file(tmp_path / "legacy.pth").keys() == tensors.keys()
    with tarfile.open(tmp_path / "old.pth", "w:") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Malicious(), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    found = message(tmp_path / "old.pth")
    assert f"{tmp_path / 'old.pth'} is a .tar of an old PyTorch, which can hold code. If you trust" in found
    assert f"torch.save(m.state_dict() if hasattr(m, 'state_dict') else m, '{tmp_path / 'old_tensors.pth'}')" in found
    assert "unpickled" not in capsys.readouterr().out


def test_the_command_that_a_message_gives_mends_the_file(make_wan, tmp_path):
    torch.save(make_wan(), tmp_path / "whole.pth")
    script = re.search(r'python -c "(.*)"$', message(tmp_path / "whole.pth"))
    assert script is not None
    exec(script[1])
    assert map_file(tmp_path / "whole_tensors.pth").keys() == make_wan().state_dict().keys()


def test_tensors_among_other_things(tmp_path):
    torch.save({"a": torch.zeros(1), "step": 3}, tmp_path / "m.pt")
    assert message(tmp_path / "m.pt").endswith("m.pt holds step besides tensors; expected tensors alone")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "says _class_name: 'UNet2DConditionModel', another architecture; expected "),
        ({"_class_name": "VaceWanModel"}, "'VaceWanModel', another architecture"),
        (
            {"model_type": "i2v"},
            "says model_type: 'i2v'; expected t2v or ti2v: name the transformer of a Wan 2.1 text-to-video",
        ),
        ({"dim": 48}, "says dim: 48, but the tensors beside it have 24; they are of different models"),
        ({"num_layers": 30}, "says num_layers: 30, but the tensors beside it have 2"),
        ({"num_heads": 5}, "dim 24 must divide into 5 heads of an even width"),
    ],
)
def test_another_architecture_by_its_config(make_wan, wan_folder, tmp_path, changes, expected):
    found = message(wan_folder(tmp_path / "wan", make_wan(), **changes))
    assert found.startswith(str(tmp_path / "wan" / "config.json"))
    assert expected in found


def test_an_image_to_video_transformer_of_diffusers(tmp_path):
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1}
    model = transformer.WanTransformer3DModel(**sizes, in_channels=36, image_dim=20, added_kv_proj_dim=24)
    model.save_pretrained(tmp_path / "transformer")
    assert re.search(r"transformer/config\.json says image_dim: 20, an image-to-video Wan; name the transf", message(tmp_path))
    (tmp_path / "transformer" / "config.json").unlink()
    assert message(tmp_path).endswith("transformer has no config.json, which tells the model's size; copy it there, too")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("img_emb.proj.0.weight", "an image-to-video Wan"),
        ("blocks.0.cross_attn.k_img.weight", "an image-to-video Wan"),
        ("down_blocks.0.resnets.0.norm1.weight", "a U-Net"),
        ("decoder.conv1.weight", "a VAE"),
        ("shared.weight", "a text encoder"),
    ],
)
def test_another_architecture_by_its_keys(make_wan, tmp_path, key, what):
    model = make_wan()
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(3)}, file)
    for found in (message(file), message(file, model)):
        assert found.startswith(f"{file} holds {key}, a key of {what}")
    save_file({"layers.0.weight": torch.zeros(3)}, file)
    assert "is no Wan transformer: it has no blocks.0.self_attn, but layers.0.weight" in message(file)


def test_mixed_shards(make_wan, wan_folder, tmp_path):
    folder = wan_folder(tmp_path / "wan", make_wan(), shards=3)
    index = folder / f"{STEM}.safetensors.index.json"
    first, second = (folder / f"{STEM}-0000{number}-of-00003.safetensors" for number in (1, 2))
    right, where = index.read_text(), json.loads(index.read_text())["weight_map"]
    name = next(iter(where))
    edit_json(index, weight_map=where | {name: second.name})
    assert f"index.json says that {name} is in {second.name}, found it in {first.name}; index and shards are" in message(folder)
    edit_json(index, weight_map=where | {"blocks.9.modulation": first.name})
    assert f"says that blocks.9.modulation is in {first.name}, but no shard holds it" in message(folder)
    edit_json(index, weight_map={key: file for key, file in where.items() if key != name})
    assert f"{first.name} holds {name}, which {index.name} does not list" in message(folder)
    edit_json(index, weight_map={})
    assert message(folder).endswith("has no `weight_map`; expected tensor name to shard: copy it again")
    index.write_text("{")
    assert re.search(r"index\.json cannot be read: .*; copy it again$", message(folder))
    index.write_text(right)
    change(second, **{name: torch.zeros(1)})
    assert f"{name} is in two shards of {folder}, {first.name} and {second.name}" in message(folder)
    second.unlink()
    assert message(folder) == f"{folder} lacks the shard {second.name} of 3; copy it again"
    index.unlink()
    assert message(folder) == f"{folder} lacks the shard {second.name} of 3; copy it again"
    save_file({name: torch.zeros(1)}, folder / f"{STEM}.safetensors")
    assert "holds files of different sets: " in message(folder)


def test_several_variants_without_a_plain_one(make_wan, wan_folder, tmp_path):
    folder = wan_folder(tmp_path / "wan", make_wan())
    plain = folder / f"{STEM}.safetensors"
    for variant in ("fp16", "bf16"):
        (folder / f"{STEM}.{variant}.safetensors").write_bytes(plain.read_bytes())
    assert open_weights(folder).config() == make_wan().config
    plain.unlink()
    names = ", ".join(f"{STEM}.{variant}.safetensors" for variant in ("bf16", "fp16"))
    assert message(folder).endswith(f"holds several sets of weights: {names}; name one file")


def test_what_does_not_fit_is_listed(make_wan, wan_folder, tmp_path):
    model = make_wan()
    folder = wan_folder(tmp_path / "wan", model)
    change(folder / f"{STEM}.safetensors", ("blocks.1.modulation",), extra=torch.zeros(2), **{"head.head.bias": torch.zeros(5)})
    assert message(folder, model).splitlines() == [
        f"the weights in {folder} do not fit the model:",
        "  missing: blocks.1.modulation [1, 6, 24]",
        "  unexpected: extra [2]",
        "  shape of head.head.bias: the file has [5], the model [16]",
    ]
    found = message(wan_folder(tmp_path / "deep", make_wan(num_layers=3)), model).splitlines()
    assert found[1] == "  unexpected: blocks.2.cross_attn.k.bias [24]"
    assert found[-2] == "  and 15 more"
    assert (
        found[-1]
        == "  they are of another size, num_layers 3, and the model has num_layers 2: name others, or write size: auto"
    )


def test_names_of_the_file_are_shown_where_they_differ(make_wan, tmp_path):
    model = make_wan()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["model.head.head.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "m.pt")
    assert "shape of head.head.bias (there model.head.head.bias): the file has [5]" in message(tmp_path / "m.pt", model)
    torch.save(state | {"head.head.bias": torch.zeros(16)}, tmp_path / "m.pt")
    assert message(tmp_path / "m.pt", model).endswith(
        "holds head.head.bias twice, as model.head.head.bias and as head.head.bias; keep one of them"
    )


def test_nothing_is_loaded_when_something_does_not_fit(make_wan, wan_folder, tmp_path):
    model, other = make_wan(), make_wan(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = wan_folder(tmp_path / "wan", other)
    change(folder / f"{STEM}.safetensors", ("head.modulation",))
    assert "missing: head.modulation [1, 2, 24]" in message(folder, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_modules_load_plain_files(tmp_path):
    model = nn.Linear(2, 1)
    save_file({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, tmp_path / "linear.safetensors")
    load_weights(model, tmp_path / "linear.safetensors")
    assert model(torch.ones(1, 2)).item() == 2
    assert read_tensors(tmp_path / "linear.safetensors")["weight"].tolist() == [[1, 1]]


def test_a_shard_of_another_model_is_named(make_wan, wan_folder, tmp_path):
    folder = wan_folder(tmp_path / "wan", make_wan(), shards=2)
    other = wan_folder(tmp_path / "other", make_wan(ffn_dim=16), shards=2)
    second = f"{STEM}-00002-of-00002.safetensors"
    (folder / second).write_bytes((other / second).read_bytes())
    assert f"shape of blocks.1.ffn.0.weight: {second} has [16, 24], the model [32, 24]" in message(folder, make_wan())


def test_a_backbones_folder_holds_no_vae_and_no_text_encoder(make_wan, wan_folder, tmp_path):
    folder = wan_folder(tmp_path / "wan", make_wan())
    with pytest.raises(CheckpointError, match=r"no VAE at .*wan, which holds only config.json, .*; .*Wan2.1_VAE.pth or"):
        find_vae(folder)
    with pytest.raises(
        CheckpointError, match=r"no text encoder at .*wan, which holds only config.json, .*; .*models_t5_umt5-xxl-enc-bf16"
    ):
        load_text_encoder(folder)
