"""Samples a random model of Wan 2.1 1.3B's size, with a VAE and a text encoder of real size, as `sftk sample` does: JSON.

    python benchmarks/sample_1.3b.py --out sample.mp4                        # 81 pictures of 480x832
    python benchmarks/sample_1.3b.py sampling.window=12 --frames 60 --runs 1
    python benchmarks/sample_1.3b.py --role real_score sampling.steps=10     # the teacher's way
    python benchmarks/sample_1.3b.py --tiny --device cpu                     # everything small, to try it

Weights are drawn where they are used; no file is read. Seconds and memory do not depend on them. Settings are those of
`recipes/wan-1.3b/dmd.yaml`, and can be changed as on the command line of `sftk sample`. Without transformers or diffusers
(`sftk[wan]`), that part is left out, and null in the JSON; without PyAV a contact sheet is written instead of an MP4. The first
of the runs counts what is done once, such as choosing kernels; `first_block_latency` and the like are those of the last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from sftk.data.codecs import PixelUnshuffle
from sftk.models import WanConfig, WanModel
from sftk.models.text import TextEncoder
from sftk.models.vae import DecodeState, WanVae, decode, decode_block, encode
from sftk.runtime.device import pick_device, set_precision
from sftk.runtime.media import can_write_mp4
from sftk.runtime.port import Port
from sftk.runtime.prompt_embeds import PromptEmbeds
from sftk.runtime.sample_files import Clip, clip_files, write_samples
from sftk.runtime.sample_options import sample_options
from sftk.runtime.sampler import Sampler
from sftk.spec.recipe import load_recipe

RECIPE = "recipes/wan-1.3b/dmd.yaml"
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
TINY_BACKBONE = {"dim": 64, "ffn_dim": 96, "num_heads": 2, "num_layers": 2, "freq_dim": 32, "text_dim": 32}
TINY_UMT5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MEASURED = ("seconds", "peak_memory_bytes", "first_block_latency", "frames_per_second")
PROMPT = "A fox runs over fresh snow at dawn, its breath in the cold air, trees behind it, handheld camera, soft light. "


class HashedWords:
    """Stands for the tokenizer: a token for each word."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, text: str, *, truncation: bool, max_length: int) -> SimpleNamespace:
        ids = [2 + zlib.crc32(word.encode()) % (self.vocabulary - 2) for word in text.split()]
        return SimpleNamespace(input_ids=[*ids[: max_length - 1], 1])


class RandomEncoder:
    """An embedder with UMT5's architecture; it is made at the first prompt and gone after `release`."""

    def __init__(self, sizes: dict[str, int], tokens: int, device: torch.device):
        self.sizes, self.device, self.shape = sizes, device, (tokens, sizes["d_model"])

    def rows(self, prompts: Any) -> list[Tensor]:
        import transformers

        with torch.device("meta"):
            module = transformers.UMT5EncoderModel(transformers.UMT5Config(**self.sizes))
        module = module.to(torch.bfloat16).to_empty(device=self.device).requires_grad_(False).eval()
        fill(module)
        words = HashedWords(self.sizes["vocab_size"])
        return TextEncoder(module, words, self.shape[0], self.device, torch.bfloat16).rows(prompts)

    def __call__(self, prompts: Any) -> Tensor:
        raise NotImplementedError

    def release(self) -> None:
        """The module went with `rows`."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class RandomText:
    """Stands for the text encoder where transformers is missing: random rows of its shape."""

    def __init__(self, tokens: int, width: int):
        self.shape = (tokens, width)

    def __call__(self, prompts: Any) -> Tensor:
        return torch.randn(len(prompts), *self.shape, generator=torch.Generator().manual_seed(0))


@attrs.frozen
class RandomVae:
    """A codec with the architecture of Wan's VAE."""

    vae: WanVae
    chunk: int

    channels = property(lambda self: self.vae.channels)
    factor = property(lambda self: self.vae.factor)

    def pixel_frames(self, latent_frames: int) -> int:
        return self.vae.pixel_frames(latent_frames)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        return encode(self.vae, video[None])[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents, chunk=self.chunk)

    @torch.no_grad()
    def decode_block(self, latents: Tensor, state: DecodeState | None) -> tuple[Tensor, DecodeState]:
        return decode_block(self.vae, latents, state, chunk=self.chunk)

    def prepare(self) -> None:
        pass


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Random weights; norms begin at 1."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))


def make_vae(device: torch.device, dtype: torch.dtype, chunk: int, tiny: bool) -> RandomVae:
    import diffusers

    with device:
        module = diffusers.AutoencoderKLWan(**({"base_dim": 4} if tiny else {}))
    return RandomVae(WanVae(module.to(dtype).requires_grad_(False).eval()), chunk)


def make_backbone(config: WanConfig, device: torch.device, precision: Any) -> Port:
    compute = set_precision(precision)
    with torch.device("meta"):
        model = WanModel(config)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).to_empty(device=device)
    fill(model)
    return Port(model.requires_grad_(False).eval(), compute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="as of `sftk sample`")
    parser.add_argument("--role", default="generator", help="whose way of sampling is taken")
    parser.add_argument("--frames", type=int, help="latent frames")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("sample_1.3b.mp4"))
    parser.add_argument("--vae-dtype", choices=("fp32", "bf16"), default="fp32", help="Wan takes fp32")
    parser.add_argument("--vae-chunk", type=int, default=1, help="latent frames that are decoded together")
    parser.add_argument("--latents", action="store_true", help="write latents, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    device = pick_device(options.device)
    small = ["latents.height=4", "latents.width=6"] if options.tiny else []
    stage = load_recipe(RECIPE)[-1]
    settings = sample_options(stage.document, stage.recipe, options.role, [*small, *options.overrides])
    config = stage.recipe.models[options.role].config
    if options.tiny:
        config = attrs.evolve(config, **TINY_BACKBONE)
    there = {name: importlib.util.find_spec(name) is not None for name in ("transformers", "diffusers", "av")}
    encoder = TINY_UMT5 if options.tiny else UMT5_XXL
    embed: Any = RandomText(config.text_len, config.text_dim)
    if there["transformers"]:
        embed = RandomEncoder(encoder, config.text_len, device)
    codec: Any = PixelUnshuffle(factor=4)  # never used: latents are written where there is no VAE
    if there["diffusers"]:
        dtype = torch.bfloat16 if options.vae_dtype == "bf16" else torch.float32
        codec = make_vae(device, dtype, options.vae_chunk, options.tiny)
    out = options.out
    if not there["diffusers"]:
        out = out.with_suffix(".safetensors")
    elif out.suffix == ".mp4" and not can_write_mp4():
        out = out.with_suffix(".png")

    runs = []
    for run in range(options.runs):
        sampler = Sampler(
            options=settings,
            load=lambda: make_backbone(config, device, settings.precision),
            embeds=PromptEmbeds(embed),
            codec=codec,
            device=device,
            weights=Path("random weights"),
        )
        files = clip_files(out, options.batch)
        clips = [Clip(prompt=PROMPT, text=PROMPT * 3, seed=index, path=path) for index, path in enumerate(files)]
        found = write_samples(sampler, clips, batch=options.batch, frames=options.frames, latents=options.latents)
        runs.append(
            {name: found[name] for name in ("seconds", "peak_memory_bytes", "first_block_latency", "frames_per_second")}
        )
        print(f"run {run}: {json.dumps(runs[-1])}", file=sys.stderr)
    print(
        json.dumps(
            {
                "device": found["device"],
                "torch": torch.__version__,
                "parameters": sum(parameter.numel() for parameter in sampler.port.module.parameters()),
                "text_encoder": encoder if there["transformers"] else None,
                "vae": {"dtype": options.vae_dtype, "chunk": options.vae_chunk} if there["diffusers"] else None,
                "latents": attrs.asdict(settings.latents),
                "precision": settings.precision,
                "sampling": found["sampling"],
                "videos": found["videos"],
                "runs": runs,
                **runs[-1],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
