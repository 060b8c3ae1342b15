from __future__ import annotations

import pytest
import torch

from sftk.errors import ShapeError, SpecError
from sftk.functional import KVCache, Layout, append, forget_text
from sftk.functional.attention import UNMASKED, available_backends
from sftk.functional.free_space import LentKV
from sftk.models import PRESETS, WanConfig, WanModel, preset
from sftk.models.config import HEAD_DIM
from sftk.models.layers import sinusoidal_embedding
from sftk.models.rope import axis_pairs, rope_table, rotate


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture
def inputs(randn):
    return randn(2, 3, 4, 4, 6), torch.tensor([[10.0, 500.0, 999.0], [0.0, 20.5, 1000.0]], dtype=torch.float64), randn(2, 4, 8)


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


FIX = "a model of another in_dim, or latents.channels: 4 in a recipe, makes them fit"


@pytest.mark.parametrize(
    ("latents", "timestep", "embeds", "message"),
    [
        ((2, 3, 5, 4, 4), (2, 3), (2, 4, 8), "latents must be [B, F, 4, H, W], found [2, 3, 5, 4, 4]; " + FIX),
        ((3, 4, 4, 4), (2, 3), (2, 4, 8), "latents must be [B, F, 4, H, W], found [3, 4, 4, 4]; " + FIX),
        ((2, 3, 4, 4, 4), (2, 4), (2, 4, 8), "timestep must be [2] or [2, 3], found [2, 4]"),
        ((2, 3, 4, 4, 4), (1,), (2, 4, 8), "timestep must be [2] or [2, 3], found [1]"),
        ((2, 3, 4, 4, 4), (2, 3), (1, 4, 8), "prompt_embeds must be [2, T, 8], found [1, 4, 8]"),
        ((2, 3, 4, 4, 4), (2, 3), (2, 4, 7), "prompt_embeds must be [2, T, 8], found [2, 4, 7]"),
        ((2, 3, 4, 4, 4), (2, 3), (2, 5, 8), "prompt_embeds hold 5 tokens, at most 4 fit"),
        ((2, 3, 4, 5, 4), (2, 3), (2, 4, 8), "a patch of (2, 2) does not divide latents of 5x4; choose multiples of it"),
    ],
)
def test_shape_errors(model, latents, timestep, embeds, message):
    with pytest.raises(ShapeError) as caught:
        model(*(torch.zeros(shape, dtype=torch.float64) for shape in (latents, timestep, embeds)))
    assert str(caught.value) == message


def test_arguments_that_do_not_fit_one_another(model, inputs):
    layout = Layout(kind="block_causal", blocks=(1, 2))
    with pytest.raises(ShapeError, match="is for 3 frames, found 2"):
        model(inputs[0][:, :2], inputs[1][:, :2], inputs[2], layout=layout)
    with pytest.raises(ShapeError, match="2 positions for 3 frames"):
        model(*inputs, positions=(0, 1))
    with pytest.raises(ShapeError, match="features_at names layer 2 of 2"):
        model(*inputs, features_at=(2,))
    cache = append(KVCache(), model(*inputs, cache=KVCache())[1], (0, 1, 2))
    with pytest.raises(ShapeError, match="a layout speaks of one pass's own frames; found one with a cache of 3 frames"):
        model(*inputs, cache=cache, layout=layout)
    # An empty cache only asks for keys and values.
    assert len(model(*inputs, cache=KVCache(), layout=layout)[1]) == 2


def test_samples_do_not_see_one_another(model, inputs):
    together = model(*inputs)[0]
    for i in range(2):
        close(model(*(x[i : i + 1] for x in inputs))[0], together[i : i + 1])


def test_a_timestep_per_sample_equals_a_constant_one_per_frame(model, inputs):
    latents, _, embeds = inputs
    per_sample = torch.tensor([250.0, 812.5], dtype=torch.float64)
    close(model(latents, per_sample, embeds)[0], model(latents, per_sample[:, None].expand(2, 3), embeds)[0])


def test_timesteps_are_per_frame(model, inputs):
    latents, timestep, embeds = inputs
    alone = Layout(kind="block_causal", blocks=(1, 1, 1), window=1)
    other = timestep.clone()
    other[:, 1] += 100
    a, b = (model(latents, t, embeds, layout=alone)[0] for t in (timestep, other))
    assert torch.equal(a[:, 0], b[:, 0])
    assert not torch.allclose(a[:, 1], b[:, 1])


def test_short_prompts_are_padded_with_zeros(model, inputs):
    latents, timestep, embeds = inputs
    padded = torch.cat([embeds[:, :2], torch.zeros(2, 2, 8, dtype=torch.float64)], 1)
    assert torch.equal(model(latents, timestep, embeds[:, :2])[0], model(latents, timestep, padded)[0])
    assert not torch.allclose(model(latents, timestep, embeds[:, :2])[0], model(latents, timestep, embeds)[0])


def test_features(model, inputs):
    flow, kv, features = model(*inputs, features_at=(0, -1))
    assert kv == ()
    assert [f.shape for f in features] == [(2, 3 * 2 * 3, 24)] * 2
    seen = []
    handles = [block.register_forward_hook(lambda _m, _i, out: seen.append(out[0])) for block in model.blocks]
    assert torch.equal(model(*inputs)[0], flow)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], features[0])
    assert torch.equal(seen[1], features[1])


def test_keys_and_values_come_with_a_cache(model, inputs):
    flow, kv, _ = model(*inputs, cache=KVCache())
    assert torch.equal(flow, model(*inputs)[0])
    assert len(kv) == 2
    for k, v, text_k, text_v in kv:
        assert k.shape == v.shape == (2, 18, 2, 12)
        assert text_k.shape == text_v.shape == (2, 4, 2, 12)


def test_default_positions_follow_the_cache(model, inputs):
    cache = append(KVCache(), model(*inputs, cache=KVCache(), positions=(4, 5, 6))[1], (4, 5, 6))
    assert torch.equal(model(*inputs, cache=cache)[0], model(*inputs, cache=cache, positions=(7, 8, 9))[0])
    assert not torch.allclose(model(*inputs, cache=cache)[0], model(*inputs, cache=cache, positions=(8, 9, 10))[0])


def test_only_differences_of_positions_matter(model, inputs):
    close(model(*inputs, positions=(0, 1, 2))[0], model(*inputs, positions=(100, 101, 102))[0], 1e-9)
    assert not torch.allclose(model(*inputs, positions=(0, 1, 2))[0], model(*inputs, positions=(0, 2, 4))[0])


@pytest.mark.parametrize("backend", [b for b in available_backends() if b not in UNMASKED])
def test_backends_agree(make_model, model, inputs, backend):
    other = make_model(backend=backend)
    for layout in (None, Layout(kind="block_causal", blocks=(1, 2))):
        close(other(*inputs, layout=layout)[0], model(*inputs, layout=layout)[0], 1e-10)


def test_the_head_starts_at_zero():
    model = WanModel(preset("digits"))
    flow = model(torch.randn(1, 2, 4, 8, 8), torch.full((1, 2), 500.0), torch.randn(1, 4, 32))[0]
    assert (flow == 0).all()


def test_bf16_runs_and_is_near(make_model, inputs):
    exact, half = make_model(torch.float32), make_model(torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    latents, timestep, embeds = inputs
    expected = exact(latents.float(), timestep.float(), embeds.float())[0]
    found, kv, _ = half(latents.bfloat16(), timestep.float(), embeds.bfloat16(), cache=KVCache())
    assert found.dtype == torch.bfloat16
    assert all(x.dtype == torch.bfloat16 for layer in kv for x in layer)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    cache = append(KVCache(), kv, (0, 1, 2))
    again = half(latents.bfloat16(), timestep.float(), embeds.bfloat16(), cache=cache)[0]
    assert again.isfinite().all()
    again.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


def test_latents_keep_their_dtype_whatever_the_weights_are(make_model, inputs):
    latents, timestep, embeds = inputs
    assert make_model(torch.float32)(latents, timestep, embeds)[0].dtype == torch.float64
    assert make_model(torch.float32)(latents.bfloat16(), timestep, embeds)[0].dtype == torch.bfloat16


def test_relative_caches_in_bf16_rotate_when_they_are_read(make_model, inputs):
    model = make_model(torch.bfloat16)
    latents, timestep, embeds = inputs[0].bfloat16(), inputs[1].float(), inputs[2].bfloat16()
    cache = append(KVCache(rope="relative"), model(latents, timestep, embeds, cache=KVCache(rope="relative"))[1], (0, 1, 2))
    assert model(latents, timestep, embeds, cache=cache)[0].isfinite().all()


def test_tables_made_while_sampling_serve_training(model, inputs):
    rope_table.cache_clear()
    with torch.inference_mode():
        model(*inputs, layout=Layout(kind="block_causal", blocks=(2, 1)))
    flow = model(*inputs, layout=Layout(kind="block_causal", blocks=(2, 1)))[0]
    assert torch.autograd.grad(flow.sum(), model.head.head.weight)[0].abs().max() > 0


# Warnings that the compiler causes in itself: it looks at `.grad` of every tensor, and says that it traces cached functions.
in_the_compiler = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def quiet(test):
    for mark in in_the_compiler:
        test = mark(test)
    return test


@quiet
def test_compiled_model_equals_eager(make_model, inputs):
    torch._dynamo.reset()
    model = make_model(num_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    layout = Layout(kind="block_causal", blocks=(1, 2))
    close(compiled(*inputs, layout=layout)[0], model(*inputs, layout=layout)[0])
    with torch.no_grad():
        cache = append(KVCache(), model(*inputs, cache=KVCache())[1], (0, 1, 2))
    close(compiled(*inputs, cache=cache)[0], model(*inputs, cache=cache)[0])


@quiet
def test_blocks_compiled_one_by_one_equal_eager(make_model, inputs):
    torch._dynamo.reset()
    model, plain = make_model(), make_model()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        cache = append(KVCache(), plain(*inputs, cache=KVCache())[1], (0, 1, 2))
    for arguments in ({}, {"cache": cache}):
        found, expected = (m(*inputs, **arguments)[0] for m in (model, plain))
        close(found, expected)
        a, b = (torch.autograd.grad(x.square().sum(), list(m.parameters())) for x, m in ((found, model), (expected, plain)))
        for x, y in zip(a, b, strict=True):
            close(x, y, 1e-9)


def test_rotation_keeps_lengths_and_adds_up(randn):
    cos, sin = rope_table((3, 7), 2, 2, 12, 1e4, 1e4, torch.device("cpu"), torch.float64)
    x = randn(1, 8, 2, 12)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    close(rotate(turned, cos, -sin), x)


@quiet
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotation_compiles_to_the_same(randn, dtype):
    """The compiled form is another one, whose products and sums are the same: so are the bits, of the gradient, too."""
    torch._dynamo.reset()
    tables = rope_table((3, 7), 2, 2, 12, 1e4, 1e4, torch.device("cpu"), torch.promote_types(dtype, torch.float32))
    x, upstream = randn(2, 8, 2, 12).to(dtype).requires_grad_(), randn(2, 8, 2, 12).to(dtype)
    found, expected = (turn(x, *tables) for turn in (torch.compile(rotate, backend="aot_eager", fullgraph=True), rotate))
    assert found.grad_fn.name() == "CompiledFunctionBackward"
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (found, expected)))


@pytest.mark.parametrize(("width", "pairs"), [(128, (22, 21, 21)), (32, (6, 5, 5)), (12, (2, 2, 2)), (2, (1, 0, 0))])
def test_axis_pairs(width, pairs):
    assert axis_pairs(width) == pairs
    assert 2 * sum(pairs) == width


def test_sinusoidal_embedding_of_half_steps():
    found = sinusoidal_embedding(torch.tensor([[937.5]]), 8)
    assert found.shape == (1, 1, 8)
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    close(found[0, 0], torch.cat([(937.5 * frequencies).cos(), (937.5 * frequencies).sin()]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 25}, "dim 25 must divide into 2 heads of an even width"),
        ({"dim": 26}, "dim 26 must divide into 2 heads of an even width"),
        ({"num_layers": 0}, "num_layers must be at least 1, found 0"),
        ({"freq_dim": 15}, "freq_dim must be even, found 15"),
        ({"patch_size": (2, 2, 2)}, "the patch must span one frame, found [2, 2, 2]"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError) as caught:
        WanConfig(**({"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2} | changes))
    assert str(caught.value) == message


def test_presets():
    assert preset("14b").num_heads == 40
    with pytest.raises(SpecError, match=r"unknown model size '1\.3B'; did you mean '1\.3b'\?"):
        preset("1.3B")
    assert set(PRESETS) == {"1.3b", "14b", "5b", "digits"}
    assert {preset(name).head_dim for name in ("1.3b", "14b", "5b")} == {HEAD_DIM}
    with torch.device("meta"):
        count = sum(p.numel() for p in WanModel(preset("1.3b")).parameters())
    assert count == 1_418_996_800


def test_an_interval_changes_nothing_at_first_and_something_once_trained(make_model, inputs):
    plain, fresh = make_model(), make_model(interval_embedding=True)
    assert set(fresh.state_dict()) - set(plain.state_dict()) == {
        f"interval_embedding.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    fresh.load_state_dict(plain.state_dict(), strict=False)
    trained = fresh(*inputs, interval=inputs[1] / 2)[0]
    fresh.reset_added_parts()
    assert torch.equal(fresh(*inputs, interval=inputs[1] / 2)[0], plain(*inputs)[0])
    assert not torch.allclose(trained, plain(*inputs)[0])


def test_no_interval_is_an_empty_one(make_model, inputs):
    model = make_model(interval_embedding=True)
    torch.nn.init.normal_(model.interval_embedding[-1].weight, std=0.5)
    empty = model(*inputs, interval=torch.zeros_like(inputs[1]))[0]
    assert torch.equal(model(*inputs)[0], empty)
    assert not torch.allclose(model(*inputs, interval=inputs[1] / 2)[0], empty)


def test_hidden_states_come_in_the_order_asked_for(model, inputs):
    first, last = model(*inputs, features_at=(0, 1))[2]
    found = model(*inputs, features_at=(-1, 0, 1))[2]
    assert [torch.equal(x, y) for x, y in zip(found, (last, first, last), strict=True)] == [True] * 3
    assert not torch.equal(first, last)


def test_intervals_that_do_not_fit(model, make_model, inputs):
    with pytest.raises(ShapeError, match="takes no interval; set interval_embedding: true"):
        model(*inputs, interval=inputs[1])
    with pytest.raises(ShapeError, match=r"interval must be of the timestep's shape \[2, 3\], found \[2\]"):
        make_model(interval_embedding=True)(*inputs, interval=inputs[1][:, 0])


def test_a_prompt_may_change_when_the_cache_forgets_its_text(model, inputs):
    latents, timestep, prompt = inputs
    other = prompt + 1
    with torch.no_grad():
        cache = append(KVCache(), model(*inputs, cache=KVCache())[1], (0, 1, 2))
        old, new = (model(latents, timestep, embeds, cache=cache)[0] for embeds in (prompt, other))
        changed = model(latents, timestep, other, cache=forget_text(cache))[0]
    assert torch.equal(old, new)
    assert not torch.allclose(changed, old)
    torch.testing.assert_close(changed, model(latents, timestep, other, cache=cache)[0])


def test_time_and_space_have_bases_of_their_own():
    """The angles of neighbours in time and in space, from the formula."""
    cos, sin = rope_table((0, 1), 2, 1, 12, 50.0, 1e4, torch.device("cpu"), torch.float64)
    angle = torch.atan2(sin, cos)[:, 0].unflatten(0, (2, 2))  # frames, rows, pairs
    time, height, _ = axis_pairs(12)
    torch.testing.assert_close(angle[1, 0, :time], 50.0 ** (-torch.arange(time, dtype=torch.float64) / time))
    torch.testing.assert_close(angle[0, 1, time : time + height], 1e4 ** (-torch.arange(height, dtype=torch.float64) / height))
    assert not angle[1, 0, time:].any()
    assert not angle[0, 1, :time].any()


@pytest.fixture
def start(model, inputs):
    """`start(reserve)`: a cache of one pass, with room for so many frames."""

    def start(reserve=9, **changes):
        kv = model(*inputs, cache=KVCache())[1]
        return append(KVCache(reserve=reserve, **changes), tuple(tuple(t.detach() for t in layer) for layer in kv), (0, 1, 2))

    return start


def passes(model, inputs, start, **more):
    """The same pass after a cache with room and after one without."""
    found = [model(*inputs, cache=start(reserve), **more) for reserve in (9, 0)]
    for one, other in zip(*(kv[0] for _, kv, _ in found), strict=True):
        close(one, other)
        assert one.dtype == other.dtype
    close(found[0][0], found[1][0])
    return found[0][1]


@torch.no_grad()
def test_a_pass_behind_its_cache_is_the_pass(model, inputs, start):
    assert isinstance(passes(model, inputs, start), LentKV)


@torch.no_grad()
def test_a_pass_of_another_dtype_than_its_cache(make_model, inputs, start):
    """As without room: cached values are converted."""
    latents, timestep, embeds = inputs
    passes(make_model(torch.float32), (latents.float(), timestep.float(), embeds.float()), start)


@torch.no_grad()
def test_passes_under_autocast_write_behind_their_cache(make_model, inputs):
    half, (latents, timestep, embeds) = make_model(torch.float32), inputs
    with torch.autocast("cpu", torch.bfloat16):
        cache = append(KVCache(reserve=9), half(latents.float(), timestep, embeds.float(), cache=KVCache())[1], (0, 1, 2))
        assert isinstance(half(latents.float(), timestep, embeds.float(), cache=cache)[1], LentKV)
    assert not isinstance(half(latents.float(), timestep, embeds.float(), cache=cache)[1], LentKV)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Dynamo detected a call to a")
@torch.no_grad()
def test_a_traced_pass_writes_nothing_behind_its_cache(model, inputs, start):
    latents, timestep, embeds = inputs
    caches = start(), start(0)

    def flow(cache):
        return torch.func.vmap(lambda x: model(x, timestep, embeds, cache=cache)[0])(torch.stack([latents, 2 * latents]))

    close(*(flow(cache) for cache in caches))
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    close(*(whole(*inputs, cache=cache)[0] for cache in caches))
