"""Weights in from every format."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import save_file

from sftk.errors import CheckpointError
from sftk.models.formats import open_weights
from sftk.models.weights import build_model, load_weights, read_config, save_weights

CPU = torch.device("cpu")


def same(model, other) -> bool:
    """Equal names, dtypes and bits."""
    left, right = model.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def built(path: Path, dtype: str = "fp32", seed: int = 9):
    return build_model(read_config(path), weights=path, seed=seed, dtype=dtype, backend="auto", device=CPU)


@pytest.mark.parametrize("shards", [1, 3])
def test_original_folder(make_wan, wan_folder, tmp_path, shards):
    model = make_wan(num_layers=3)
    folder = wan_folder(tmp_path / "Wan2.1-T2V", model, shards=shards)
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"not read")
    source = open_weights(folder)
    assert (source.format, source.config()) == ("original", model.config)
    assert source.bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert same(built(folder), model)


def test_index_file_and_single_file_of_a_folder(make_wan, wan_folder, tmp_path):
    model = make_wan()
    sharded, whole = wan_folder(tmp_path / "a", model, shards=2), wan_folder(tmp_path / "b", model)
    assert same(built(sharded / "diffusion_pytorch_model.safetensors.index.json"), model)
    assert same(built(whole / "diffusion_pytorch_model.safetensors"), model)
    (sharded / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert same(built(sharded), model)


def test_config_tells_what_shapes_do_not_and_shapes_what_it_leaves_out(make_wan, wan_folder, tmp_path):
    model = make_wan(num_heads=4, eps=1e-5, text_len=7, cross_attn_norm=False, qk_norm=False, patch_size=(1, 2, 1), in_dim=6)
    assert read_config(wan_folder(tmp_path / "wan", model)) == model.config
    wrong = wan_folder(tmp_path / "wrong", model, num_heads=2)
    with pytest.raises(CheckpointError, match=r"config\.json says num_heads: 2, the model has 4; write size: auto"):
        load_weights(model, wrong)


def test_loading_casts_to_the_models_dtype(make_wan, wan_folder, tmp_path):
    model = make_wan(torch.bfloat16)
    folder = wan_folder(tmp_path / "wan", model)
    assert same(built(folder, "bf16"), model)
    wide = built(folder, "fp32").state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in wide.values())
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in model.state_dict().items())


STYLES = {
    "model": lambda name: f"model.{name}",
    "fsdp": lambda name: f"model._fsdp_wrapped_module.{name.replace('blocks.0.', 'blocks.0._fsdp_wrapped_module.')}",
    "checkpoint": lambda name: f"model.{name.replace('blocks.1.', 'blocks.1._checkpoint_wrapped_module.')}",
    "compile": lambda name: f"_orig_mod.model.{name.replace('blocks.0.', 'blocks.0._orig_mod.')}",
    "both": lambda name: (
        f"model._fsdp_wrapped_module.{name.replace('.ffn', '._fsdp_wrapped_module._checkpoint_wrapped_module.ffn')}"
    ),
    "plain": lambda name: name,
}


@pytest.mark.parametrize("style", STYLES)
def test_training_checkpoints_in_each_prefix_style(make_wan, tmp_path, style):
    models = [make_wan(seed=seed, dim=256, num_heads=2) for seed in range(3)]
    entries = {
        entry: {STYLES[style](name): tensor for name, tensor in model.state_dict().items()}
        for entry, model in zip(("critic", "generator", "generator_ema"), models, strict=True)
    }
    file = tmp_path / "model.pt"
    torch.save({**entries, "step": 600}, file)
    for entry, model in zip(entries, models, strict=True):
        named = Path(f"{file}:{entry}")
        assert read_config(named) == model.config
        assert same(built(named), model)
    assert same(built(file), models[2])
    del entries["generator_ema"]
    torch.save(entries, file)
    assert same(built(file), models[1])
    torch.save(entries["critic"], file)
    assert same(built(file), models[0])


def test_an_old_pickle_is_read_without_mapping(make_wan, tmp_path):
    model = make_wan(dim=256, num_heads=2)
    torch.save({"generator": model.state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(built(tmp_path / "old.pt"), model)


def test_heads_that_no_file_tells(make_wan, tmp_path):
    model = make_wan(dim=24)
    torch.save({"generator": model.state_dict()}, tmp_path / "narrow.pt")
    with pytest.raises(CheckpointError, match=r"does not tell the number of heads \(width 24\); write the model's `size` out"):
        read_config(tmp_path / "narrow.pt")
    other = make_wan(seed=1)
    load_weights(other, tmp_path / "narrow.pt")
    assert same(other, model)


def test_entries_that_are_not_there(make_wan, tmp_path):
    state = make_wan().state_dict()
    torch.save({"generator": state, "critic": state}, tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError, match=r"m\.pt has no entry 'generater' of tensors, but the entries generator, critic; did you"
    ):
        open_weights(Path(f"{tmp_path / 'm.pt'}:generater"))
    torch.save({"teacher": state, "critic": state}, tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError, match=r"holds the entries teacher, critic; expected tensors, or name the entry: m\.pt:<entry>"
    ):
        open_weights(tmp_path / "m.pt")


def test_an_entry_that_is_no_dictionary_of_tensors(tmp_path):
    torch.save({"step": 3}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt holds only step; expected tensors"):
        open_weights(tmp_path / "m.pt")
    torch.save([torch.zeros(1)], tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt holds a list, expected a dictionary of tensors"):
        open_weights(tmp_path / "m.pt")


def test_our_own_file_keeps_what_others_cannot_tell(make_model, tmp_path):
    model = make_model(torch.float32, rope_base=100.0, interval_embedding=True)
    save_weights(model, tmp_path / "ours.safetensors")
    assert read_config(tmp_path / "ours.safetensors") == model.config
    assert same(built(tmp_path / "ours.safetensors"), model)


def test_a_part_of_ours_may_be_missing_in_a_foreign_folder(make_wan, wan_folder, tmp_path):
    model = make_wan()
    folder = wan_folder(tmp_path / "wan", model)
    config = attrs.evolve(model.config, interval_embedding=True)
    more = build_model(config, weights=folder, seed=0, dtype="fp32", backend="auto", device=CPU)
    assert torch.equal(more.head.head.weight, model.head.head.weight)
    assert more.interval_embedding[2].weight.abs().max() == 0


def test_diffusers_names_in_one_file(make_wan, wan_folder, tmp_path):
    from sftk.models.names import rename

    model = make_wan(dim=256, num_heads=2)
    state = {rename(name, "diffusers"): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "finetuned.safetensors")
    assert open_weights(tmp_path / "finetuned.safetensors").format == "diffusers"
    assert same(built(tmp_path / "finetuned.safetensors"), model)
