"""Streams: the whole rollout block by block, equal to it and to its whole decode, with flat memory, and interruptible."""

from __future__ import annotations

import gc

import pytest
import torch

from sftk.data.codecs import digits_codec, make_codec
from sftk.data.embedders import make_embedder
from sftk.errors import SftkError, ShapeError
from sftk.functional import FrameNoise, Key
from sftk.functional.cache import KVCache
from sftk.runtime.port import Port
from sftk.runtime.prompt_embeds import PromptEmbeds
from sftk.runtime.sample_options import SampleOptions
from sftk.runtime.sampler import Sampler, spread_seeds
from sftk.spec.sampling import (
    CausalOdeSampling,
    StudentSampling,
    TeacherSampling,
    WholeFewStepSampling,
    sampler_graph,
)
from sftk.spec.schema import LatentsSection

PROMPTS = ["a 3 moving left", "a 5 moving up", "a 0 moving right"]
STUDENT = StudentSampling(steps=(1000, 500), shift=3.0, window=6, sink=1)
CAUSAL = CausalOdeSampling(method="causal_ode", steps=2, shift=3.0, guidance=2.0, window=6)
ODE = TeacherSampling(steps=2, guidance=2.0)
FEW = WholeFewStepSampling(method="bidirectional_few_step", steps=(1000, 500))
causal = pytest.mark.parametrize("sampling", [STUDENT, CAUSAL], ids=["few_step", "causal_ode"])
every = pytest.mark.parametrize("sampling", [STUDENT, CAUSAL, ODE, FEW], ids=lambda one: one.method)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(torch.float32, text_dim=32).requires_grad_(False)


@pytest.fixture(scope="module")
def wan_model(make_model):
    return make_model(torch.float32, text_dim=32, in_dim=16, out_dim=16).requires_grad_(False)


def make_sampler(model, sampling, codec=None, **latents) -> Sampler:
    sizes = {"frames": 6, "channels": model.config.in_dim, "height": 8, "width": 8} | latents
    return Sampler(
        options=SampleOptions(sampling=sampling, latents=LatentsSection(**sizes)),
        load=lambda: Port(model, None),
        embeds=PromptEmbeds(make_embedder("digits")),
        codec=codec or digits_codec(),
        device=torch.device("cpu"),
        weights="random",
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every
def test_a_stream_is_the_sample_and_the_whole_decode_of_the_rollout(model, sampling):
    sampler = make_sampler(model, sampling)
    blocks = list(sampler.stream(PROMPTS, seeds=4))
    assert [block.shape[1] for block in blocks] == ([3, 3] if sampler.causal else [6])
    assert torch.equal(torch.cat(blocks, 1), sampler.sample(PROMPTS, seeds=4))
    key = Key(seed=0, phase="sample", samples=(4, 5, 6))
    embeds = make_embedder("digits")
    values = {"key": key, "noise": FrameNoise(key, (4, 8, 8), 6).whole(), "prompt_embeds": embeds(PROMPTS)}
    values["negative_embeds"] = embeds([""] * 3)
    graph = sampler_graph(sampling)
    with torch.no_grad():
        x0 = graph.run({name: values[name] for name in graph.inputs}, {"denoiser": sampler.port})["x0"]
    assert torch.equal(torch.cat(blocks, 1), digits_codec().decode(x0))


@every
def test_a_video_is_its_prompt_and_seed_whatever_the_batch(model, sampling):
    sampler = make_sampler(model, sampling)
    together = sampler.sample(PROMPTS, seeds=[7, 1, 4])
    close(sampler.sample(PROMPTS, seeds=[7, 1, 4], batch=2), together)
    close(sampler.sample([PROMPTS[2], PROMPTS[0]], seeds=[4, 7]), together[[2, 0]])
    assert not torch.allclose(sampler.sample(PROMPTS[:1], seeds=8), together[:1], atol=1e-2)


@causal
def test_a_longer_video_begins_the_same(model, sampling):
    sampler = make_sampler(model, sampling)
    close(sampler.sample(PROMPTS[:1], frames=12)[:, :6], sampler.sample(PROMPTS[:1]))


@pytest.mark.parametrize("sampling", [STUDENT, CAUSAL, ODE], ids=["few_step", "causal_ode", "bidirectional_ode"])
@pytest.mark.parametrize("given", [1, 3])
def test_given_latents_are_the_beginning(model, sampling, given):
    sampler = make_sampler(model, sampling)
    initial = torch.randn(2, given, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stream = sampler.stream(PROMPTS[:2], initial_latents=initial)
    frames = torch.cat(list(stream), 1)
    assert frames.shape[1] == stream.frames == given + 6
    assert torch.equal(frames[:, :given], digits_codec().decode(initial))
    assert not torch.allclose(sampler.sample(PROMPTS[:2], initial_latents=-initial)[:, given:], frames[:, given:], atol=1e-3)
    one = sampler.sample(PROMPTS[:2], initial_latents=initial[:1])
    assert torch.equal(one[0], frames[0])


def test_going_on_from_a_video_is_the_longer_video(model):
    """The frames that are given are committed as the rollout commits its own; the noise is that of a new video."""
    sampler = make_sampler(model, STUDENT)
    first = sampler.sample(PROMPTS[:1], decode=False)
    again = sampler.sample(PROMPTS[:1], initial_latents=first, frames=3, decode=False)
    assert torch.equal(again[:, :6], first)
    assert again.shape[1] == 9


def test_latency_and_seconds(model):
    stream = make_sampler(model, STUDENT).stream(PROMPTS[:1], initial_latents=torch.zeros(1, 1, 4, 8, 8))
    assert (stream.latency, stream.seconds, stream.frames) == (None, 0.0, 0)
    next(stream)
    assert stream.latency is None, "the first frames were given"
    next(stream)
    assert stream.latents is not None
    assert stream.latents.shape == (1, 3, 4, 8, 8)
    latency = stream.latency
    assert 0 < latency == stream.seconds
    next(stream)
    assert stream.latency == latency < stream.seconds


def live_caches() -> tuple[int, int, int]:
    """How many caches there are, frames of the longest, and bytes of all."""
    gc.collect()
    caches = [one for one in gc.get_objects() if type(one) is KVCache]
    pairs = [pair for cache in caches for chunk in cache.chunks for pair in chunk.layers]
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for pair in pairs for tensor in pair}
    return len(caches), max((cache.frames for cache in caches), default=0), sum(storages.values())


@causal
def test_memory_does_not_grow_with_the_length_and_is_freed(model, sampling):
    before = live_caches()
    stream = make_sampler(model, sampling).stream(PROMPTS[:1], frames=300)
    for _ in range(3):
        next(stream)
    found = [live_caches() for _ in zip(range(3), stream, strict=False)]
    assert len(set(found)) == 1, found
    assert found[-1][1] == 6, "before the next block's window"
    stream.close()
    assert live_caches() == before
    assert next(stream, None) is None


def test_a_stream_leaves_gradients_as_they_are_between_blocks(model):
    stream = make_sampler(model, STUDENT).stream(PROMPTS[:1])
    assert torch.is_grad_enabled()
    assert not next(stream).requires_grad
    assert torch.is_grad_enabled()


@causal
@pytest.mark.parametrize("given", [0, 1])
def test_wan_pictures_are_those_of_the_whole_decode(wan_model, sampling, given, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.AutoencoderKLWan(base_dim=4).save_pretrained(tmp_path / "vae")
    codec = make_codec({"use": "wan_vae", "with": {"path": str(tmp_path), "device": "cpu"}})
    sampler = make_sampler(wan_model, sampling, codec, height=4, width=6)
    initial = torch.randn(1, 1, 16, 4, 6) if given else None
    blocks = list(sampler.stream(PROMPTS[:2], initial_latents=initial))
    assert [block.shape[1] for block in blocks] == ([1, 12, 12] if given else [9, 12])
    latents = sampler.sample(PROMPTS[:2], initial_latents=initial, decode=False)
    torch.testing.assert_close(torch.cat(blocks, 1), codec.decode(latents), rtol=0, atol=1e-5)


def test_the_encoder_is_released_before_the_backbone_is_loaded(model):
    events = []

    class Encoder:
        shape = (4, 32)

        def __call__(self, prompts):
            events.append(("embed", list(prompts)))
            return make_embedder("digits")(prompts)

        def release(self):
            events.append("release")

    def load():
        events.append("load")
        return Port(model, None)

    sampler = make_sampler(model, STUDENT)
    sampler = Sampler(
        options=sampler.options,
        load=load,
        embeds=PromptEmbeds(Encoder()),
        codec=sampler.codec,
        device=sampler.device,
        weights="",
    )
    sampler.sample([PROMPTS[0], PROMPTS[0], PROMPTS[1]], batch=1)
    assert events == [("embed", [PROMPTS[0], PROMPTS[1], ""]), "release", "load"]


def test_mistakes_are_named(model):
    sampler = make_sampler(model, STUDENT)
    with pytest.raises(ShapeError, match="7 frames do not divide into blocks of 3; take 6 or 9 frames"):
        sampler.stream(PROMPTS, frames=7)
    wide = r"shape \[1, 1, 4, 8, 9\], expected \[3, F, 4, 8, 8\] .*; give others, or set latents: {.*width: 9}"
    with pytest.raises(ShapeError, match=wide):
        sampler.stream(PROMPTS, initial_latents=torch.zeros(1, 1, 4, 8, 9))
    with pytest.raises(ShapeError, match="5 frames do not divide into blocks of 3"):
        sampler.stream(PROMPTS, initial_latents=torch.zeros(1, 5, 4, 8, 8))
    with pytest.raises(SftkError, match="the method bidirectional_few_step takes no given frames"):
        make_sampler(model, FEW).stream(PROMPTS, initial_latents=torch.zeros(1, 1, 4, 8, 8))
    with pytest.raises(SftkError, match="2 seeds for 3 videos; give one for each, or the first only"):
        spread_seeds(3, (1, 2))
