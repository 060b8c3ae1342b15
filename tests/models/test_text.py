"""The text encoder from both public formats, with small random weights and a tokenizer made here."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import torch

from sftk.errors import CheckpointError
from sftk.models.text import TextEncoder, clean_prompt, load_text_encoder
from sftk.models.text_keys import encoder_config, to_transformers, to_wan

transformers = pytest.importorskip("transformers")

PROMPTS = ("a red fox", "", "the hare runs slowly over the snow " * 4)


def mapped_file(tensor) -> str:
    """The file whose pages a tensor's memory is, as the kernel tells; empty for memory that was allocated."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, *_, name = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in area.split("-"))
        if first <= tensor.data_ptr() < last:
            return name if name.startswith("/") else ""
    return ""


def test_both_formats_give_equal_embeddings(text_folders):
    ours = [load_text_encoder(text_folders / name, tokens=24)(PROMPTS) for name in ("hf", "wan")]
    assert ours[0].shape == (3, 24, 16)
    assert ours[0].dtype == torch.float32
    assert torch.equal(ours[0], ours[1])
    assert ours[0].std() > 0.1


def test_embeddings_are_those_of_a_padded_and_masked_batch(text_folders):
    """As Wan does it: padded to the full length, masked, zeroed after the true length."""
    encoder = load_text_encoder(text_folders / "wan", tokens=24, dtype=torch.float32)
    batch = encoder.tokenizer(list(PROMPTS), padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    wanted = encoder.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    wanted = wanted * batch.attention_mask[..., None]
    torch.testing.assert_close(encoder(PROMPTS), wanted, rtol=0, atol=1e-5)
    lengths = [len(rows) for rows in encoder.rows(PROMPTS)]
    assert lengths == batch.attention_mask.sum(1).tolist() == [4, 1, 24]  # the last is cut
    assert all(not encoder(PROMPTS)[i, length:].any() for i, length in enumerate(lengths))


def test_a_prompts_embedding_does_not_depend_on_the_others(text_folders):
    encoder = load_text_encoder(text_folders / "hf", tokens=24)
    assert torch.equal(encoder(PROMPTS)[0], encoder(PROMPTS[:1])[0])


def test_every_layer_has_position_buckets_of_its_own(text_folders):
    encoder = load_text_encoder(text_folders / "wan", tokens=24, dtype=torch.float32)
    before = encoder(PROMPTS[:1])
    encoder.module.encoder.block[2].layer[0].SelfAttention.relative_attention_bias.weight.mul_(2)
    assert (encoder(PROMPTS[:1]) - before).abs().max() > 1e-3


def test_offload_gives_the_same_and_leaves_the_weights_where_they_were(text_folders):
    kept = load_text_encoder(text_folders / "wan", tokens=24, dtype=torch.float32)
    offloaded = load_text_encoder(text_folders / "wan", tokens=24, dtype=torch.float32, offload=True)
    before = {name: parameter.data_ptr() for name, parameter in offloaded.module.named_parameters()}
    assert torch.equal(offloaded(PROMPTS), kept(PROMPTS))
    assert before == {name: parameter.data_ptr() for name, parameter in offloaded.module.named_parameters()}
    assert all(parameter.dtype == torch.bfloat16 for parameter in offloaded.module.parameters())


@pytest.mark.parametrize("name", ["hf", "wan"])
def test_the_table_of_tokens_is_held_once(text_folders, name):
    module = load_text_encoder(text_folders / name).module
    assert module.encoder.embed_tokens.weight is module.shared.weight


def test_weights_are_mapped_from_the_file(text_folders):
    """Without a change of dtype or device the parameters are the file's pages: nothing was read yet."""
    module = load_text_encoder(text_folders / "wan", tokens=24).module
    assert module.shared.weight.data_ptr() == module.encoder.embed_tokens.weight.data_ptr()
    assert mapped_file(module.shared.weight) == str(text_folders / "wan" / "models_t5_umt5-xxl-enc-bf16.pth")
    module = load_text_encoder(text_folders / "hf", tokens=24).module
    assert mapped_file(module.shared.weight).startswith(str(text_folders / "hf" / "text_encoder" / "model-0000"))


def test_names_and_sizes_are_those_of_wans_file(tmp_path):
    """umt5-xxl on the meta device, in Wan's names; the published file has 242 tensors of 5.68 billion parameters."""
    config = transformers.UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        weights = transformers.UMT5EncoderModel(config).state_dict()
    weights.pop("encoder.embed_tokens.weight")
    original = to_wan(weights)
    assert len(original) == 242
    assert sum(tensor.numel() for tensor in original.values()) == 5_680_910_336
    assert {
        "token_embedding.weight",
        "blocks.0.norm1.weight",
        "blocks.5.attn.q.weight",
        "blocks.23.pos_embedding.embedding.weight",
        "blocks.10.ffn.gate.0.weight",
        "blocks.10.ffn.fc1.weight",
        "blocks.10.ffn.fc2.weight",
        "norm.weight",
    } <= original.keys()
    assert list(to_transformers(original)) == list(weights)
    found = encoder_config(original, tmp_path)
    assert found == {key: getattr(config, key) for key in found}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\tfox\n\nruns ", "a fox runs"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        (html.escape(html.escape("\"fox\" & 'hare'")), "\"fox\" & 'hare'"),
        ("a\u00a0fox\u3000runs", "a fox runs"),
    ],
)
def test_prompts_are_cleaned_as_wan_does(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_a_missing_tokenizer_says_where_it_belongs(text_folders, tmp_path):
    (tmp_path / "text_encoder").symlink_to(text_folders / "hf" / "text_encoder")
    with pytest.raises(CheckpointError, match=r"missing tokenizer: none of .*tokenizer.* holds tokenizer.json or spiece.model"):
        load_text_encoder(tmp_path)
    encoder = load_text_encoder(tmp_path, tokenizer=text_folders / "hf" / "tokenizer", tokens=24)
    assert isinstance(encoder, TextEncoder)
    assert encoder.width == 16


def test_wrong_files_are_named(text_folders, tmp_path):
    words = text_folders / "hf" / "tokenizer"
    with pytest.raises(CheckpointError, match=r"no text encoder at .*nothing, which is no folder"):
        load_text_encoder(tmp_path / "nothing", tokenizer=words)
    file = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    whole = torch.load(text_folders / "wan" / file.name, weights_only=True)
    torch.save({"patch_embedding.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"is no text encoder of Wan: it lacks token_embedding.weight"):
        load_text_encoder(file, tokenizer=words)
    torch.save({name: tensor for name, tensor in whole.items() if name != "blocks.1.norm2.weight"}, file)
    with pytest.raises(CheckpointError, match=r"missing: encoder.block.1.layer.1.layer_norm.weight \[16\]"):
        load_text_encoder(file, tokenizer=words)
    torch.save([whole], file)
    with pytest.raises(CheckpointError, match=r"holds a list, expected a dictionary of tensors"):
        load_text_encoder(file, tokenizer=words)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match=r"is of a 't5' model; expected 'umt5'"):
        load_text_encoder(tmp_path, tokenizer=words)


def test_a_truncated_shard_is_named(text_folders, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    for file in (text_folders / "hf" / "text_encoder").iterdir():
        data = file.read_bytes()
        whole = "00001" not in file.name
        (tmp_path / "text_encoder" / file.name).write_bytes(data if whole else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+.safetensors is not a whole safetensors file"):
        load_text_encoder(tmp_path, tokenizer=text_folders / "hf" / "tokenizer")


def test_a_pickle_with_code_is_not_run(text_folders, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    file = tmp_path / "models.pth"
    torch.save({"token_embedding.weight": Evil()}, file)
    with pytest.raises(CheckpointError, match=r"holds more than tensors"):
        load_text_encoder(file, tokenizer=text_folders / "hf" / "tokenizer")
    assert "ran" not in capsys.readouterr().out
