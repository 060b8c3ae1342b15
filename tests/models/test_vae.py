"""The VAE against diffusers' own whole decode, tiles and posterior, with random weights in the public formats."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sftk.errors import CheckpointError, ShapeError
from sftk.models.vae import Tiles, WanVae, decode, decode_block, encode, load_vae
from sftk.models.vae_keys import STATISTICS, to_diffusers, to_wan, vae_config

diffusers = pytest.importorskip("diffusers")

WAN_21 = {"base_dim": 4, "z_dim": 16}
WAN_22 = {
    "base_dim": 4,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [float(number) for number in STATISTICS[48][0].split()],
    "latents_std": [float(number) for number in STATISTICS[48][1].split()],
}
VERSIONS = {"2.1": WAN_21, "2.2": WAN_22}
_MADE: dict[str, torch.nn.Module] = {}


def make(version: str, **changes):
    """A VAE with random weights."""
    key = f"{version} {changes}"
    if key not in _MADE:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = diffusers.AutoencoderKLWan(**(VERSIONS[version] | changes)).requires_grad_(False).eval()
        _MADE[key] = module
    return _MADE[key]


def whole_decode(module, latents):
    """Frames in [0, 1] by diffusers alone, as its pipelines decode."""
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (module.config.latents_mean, module.config.latents_std)
    )
    pixels = module.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    return (pixels + 1) / 2


def random_latents(vae, *shape, seed=0):
    batch, frames, height, width = shape
    return torch.randn(batch, frames, vae.channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("blocks", [(7,), (1, 3, 3), (3, 3, 1), (2, 1, 4), (1,) * 7])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_stream_of_blocks_equals_the_whole_decode(version, blocks, chunk):
    vae = WanVae(make(version))
    latents = random_latents(vae, 2, 7, 2, 3)
    wanted = whole_decode(vae.module, latents)
    assert wanted.std() > 0.05  # not grey
    state, frames = None, []
    for block in latents.split(blocks, dim=1):
        pictures, state = decode_block(vae, block, state, chunk=chunk)
        frames.append(pictures)
    assert [len(part[0]) for part in frames] == [1 + 4 * (blocks[0] - 1), *(4 * count for count in blocks[1:])]
    assert state.frames == 7
    torch.testing.assert_close(torch.cat(frames, dim=1), wanted, rtol=0, atol=1e-5)
    whole = decode(vae, latents, chunk=chunk)
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-5)
    if chunk == 1:
        assert torch.equal(torch.cat(frames, dim=1), whole)  # the cut into blocks does not even change the rounding


@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_any_block_lengths_give_the_whole(lengths, seed):
    vae = WanVae(make("2.1"))
    latents = random_latents(vae, 1, sum(lengths), 1, 2, seed=seed)
    state, frames = None, []
    for block in latents.split(lengths, dim=1):
        pictures, state = decode_block(vae, block, state)
        frames.append(pictures)
    torch.testing.assert_close(torch.cat(frames, dim=1), whole_decode(vae.module, latents), rtol=0, atol=1e-5)


def test_a_state_is_a_value_that_two_streams_may_continue():
    vae = WanVae(make("2.1"))
    start, one, other = (random_latents(vae, 1, 2, 1, 2, seed=seed) for seed in range(3))
    _, state = decode_block(vae, start)
    first = decode_block(vae, one, state)[0]
    second = decode_block(vae, other, state)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, decode_block(vae, one, state)[0])
    assert torch.equal(second, decode_block(vae, other, state)[0])


def test_the_past_matters_to_a_block():
    vae = WanVae(make("2.1"))
    start, after = random_latents(vae, 1, 2, 1, 2), random_latents(vae, 1, 2, 1, 2, seed=1)
    carried = decode_block(vae, after, decode_block(vae, start)[1])[0]
    assert (carried[:, -5:] - decode_block(vae, after)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("version", VERSIONS)
def test_tiled_decode_equals_diffusers_tiled_decode_and_streams(version):
    vae = WanVae(make(version, dropout=0.0), Tiles(size=64, stride=48))
    height, width = 96 // vae.factor, 144 // vae.factor
    latents = random_latents(vae, 1, 3, height, width)
    whole = whole_decode(vae.module, latents)
    vae.module.enable_tiling(64, 64, 48, 48)
    try:
        wanted = whole_decode(vae.module, latents)
    finally:
        vae.module.use_tiling = False
    assert (whole - wanted).abs().max() > 1e-4  # tiles do change the picture
    first, state = decode_block(vae, latents[:, :1])
    rest, _ = decode_block(vae, latents[:, 1:], state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), wanted, rtol=0, atol=1e-5)


def test_slicing_changes_nothing():
    vae = WanVae(make("2.1"))
    latents = random_latents(vae, 2, 2, 2, 2)
    sliced = WanVae(vae.module, slicing=True)
    torch.testing.assert_close(decode(sliced, latents), decode(vae, latents), rtol=0, atol=1e-5)
    video = torch.rand(2, 5, 3, 16, 16)
    torch.testing.assert_close(encode(sliced, video), encode(vae, video), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_encode_normalises_the_posteriors_mode(version):
    module = make(version)
    vae = WanVae(module)
    video = torch.rand(1, 9, 3, 2 * vae.factor, vae.factor)
    found = encode(vae, video)
    assert found.shape == (1, 3, vae.channels, 2, 1)
    mode = module.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode().transpose(1, 2)
    mean, std = (torch.tensor(values) for values in (module.config.latents_mean, module.config.latents_std))
    torch.testing.assert_close(found * std[:, None, None] + mean[:, None, None], mode, rtol=0, atol=1e-5)
    # A picture alone is the start of the clip: nothing of the future reaches it.
    torch.testing.assert_close(encode(vae, video[:, :1]), found[:, :1], rtol=0, atol=1e-5)


def test_wrong_shapes_are_named():
    vae = WanVae(make("2.1"))
    with pytest.raises(ShapeError, match=r"6 pictures; expected 1 plus a multiple of 4"):
        encode(vae, torch.rand(1, 6, 3, 16, 16))
    with pytest.raises(ShapeError, match=r"sides that 8 divides"):
        encode(vae, torch.rand(1, 5, 3, 20, 16))
    with pytest.raises(ShapeError, match=r"expected \[B, F, 16, h, w\]"):
        decode(vae, torch.zeros(1, 2, 4, 2, 2))
    with pytest.raises(ShapeError, match=r"\[1, 3, 2\], the blocks before had \[1, 2, 2\]"):
        decode_block(vae, torch.zeros(1, 1, 16, 3, 2), decode_block(vae, torch.zeros(1, 1, 16, 2, 2))[1])


@pytest.mark.parametrize("version", VERSIONS)
def test_wans_own_file_gives_the_same_vae(version, tmp_path):
    module = make(version)
    config = dict(module.config)
    original = to_wan(module.state_dict(), config)
    back = to_diffusers(original, config)
    assert list(back) == list(module.state_dict())
    file = tmp_path / f"Wan{version}_VAE.pth"
    torch.save(original, file)
    save_file(original, tmp_path / "vae.safetensors")
    torch.save(original, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (file, tmp_path, tmp_path / "vae.safetensors", tmp_path / "old.pth"):
        vae = load_vae(path)
        for name, tensor in module.state_dict().items():
            assert torch.equal(vae.module.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("version", "names"),
    [
        (
            "2.1",
            (
                "conv1.weight",
                "conv2.bias",
                "encoder.conv1.weight",
                "encoder.downsamples.0.residual.0.gamma",
                "encoder.downsamples.3.shortcut.weight",
                "encoder.downsamples.5.time_conv.weight",
                "encoder.middle.1.to_qkv.weight",
                "encoder.head.2.bias",
                "decoder.upsamples.2.residual.6.weight",
                "decoder.upsamples.3.resample.1.weight",
                "decoder.upsamples.4.shortcut.bias",
                "decoder.upsamples.7.time_conv.bias",
                "decoder.upsamples.14.residual.3.gamma",
                "decoder.head.0.gamma",
            ),
        ),
        (
            "2.2",
            (
                "encoder.downsamples.1.downsamples.0.shortcut.weight",
                "encoder.downsamples.1.downsamples.2.time_conv.weight",
                "decoder.upsamples.0.upsamples.3.time_conv.weight",
                "decoder.upsamples.3.upsamples.2.residual.6.weight",
            ),
        ),
    ],
)
def test_names_are_those_of_the_public_files(version, names):
    module = make(version)
    assert set(names) <= to_wan(module.state_dict(), dict(module.config)).keys()


def test_a_diffusers_folder_loads(tmp_path):
    module = make("2.1")
    module.save_pretrained(tmp_path / "vae")
    for path in (tmp_path, tmp_path / "vae"):
        vae = load_vae(path, dtype=torch.bfloat16)
        assert vae.dtype == torch.bfloat16
        assert torch.equal(vae.module.quant_conv.weight, module.quant_conv.weight.bfloat16())
    module.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(load_vae(tmp_path / "sharded").module.quant_conv.weight, module.quant_conv.weight)


def test_what_is_no_vae_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no VAE at .*missing, which is no folder; expected"):
        load_vae(tmp_path / "missing")
    module = make("2.1")
    original = to_wan(module.state_dict(), dict(module.config))
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save(original, file)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"Wan2.1_VAE.pth is not a whole PyTorch file"):
        load_vae(file)
    torch.save(original | {"decoder.head.2.bias": torch.zeros(5)}, file)
    with pytest.raises(CheckpointError, match=r"shape of decoder.conv_out.bias: \[5\] in the file, \[3\] in the model"):
        load_vae(file)
    torch.save({"blocks.0.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"is no Wan VAE: it lacks encoder.conv1.weight"):
        load_vae(file)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match=r"class AutoencoderKL; expected AutoencoderKLWan"):
        load_vae(tmp_path / "other")


def test_shards_that_do_not_belong_together_are_named(tmp_path):
    make("2.1").save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    value = json.loads(index.read_text())
    shards = sorted(set(value["weight_map"].values()))
    value["weight_map"]["quant_conv.bias"] = next(name for name in shards if name != value["weight_map"]["quant_conv.bias"])
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"says that quant_conv.bias is in .*, found it in .*of different sets"):
        load_vae(tmp_path)
    (tmp_path / shards[0]).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks the shard {shards[0]} of {len(shards)}"):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [({"base_dim": 96}, 126_892_531), ({**WAN_22, "base_dim": 160, "decoder_base_dim": 256}, 704_688_668)],
)
def test_the_published_sizes_are_read_from_wans_files(changes, parameters, tmp_path):
    with torch.device("meta"):
        module = diffusers.AutoencoderKLWan(**changes)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    found = vae_config(to_wan(module.state_dict(), dict(module.config)), tmp_path)
    assert found["decoder_base_dim"] == changes.get("decoder_base_dim", 96)
    others = found.keys() - {"decoder_base_dim"}
    assert {key: found[key] for key in others} == {key: module.config[key] for key in others}
