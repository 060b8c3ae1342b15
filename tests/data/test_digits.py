import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sftk.data.digits import (
    DIRECTIONS,
    DigitClips,
    collate,
    decode_latents,
    embed_prompts,
    encode_latents,
    load_digits,
    parse_prompt,
    prompt_text,
    render_clips,
)
from sftk.data.digits_build import ASSET, build_digits
from sftk.errors import DataError, ShapeError

fast = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def sample_clips(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 8, 8, generator=generator)
    directions = torch.randint(4, (count,), generator=generator)
    return images, directions, torch.randint(-40, 40, (count, 2), generator=generator)


def test_splits_are_stratified_and_disjoint():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train.labels), len(test.labels)) == (1501, 296)
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert share.min() > 0.155
    assert share.max() < 0.17
    assert test.images.dtype == torch.float32
    assert test.images.min() == 0
    assert test.images.max() == 1
    every = torch.cat((train.images, test.images)).flatten(1)
    assert torch.unique(every, dim=0).shape[0] == 1797


def test_load_digits_names_the_nearest_split():
    with pytest.raises(DataError, match="did you mean 'train'"):
        load_digits("trian")  # pyright: ignore[reportArgumentType]


def test_asset_is_small():
    assert ASSET.stat().st_size < 100_000


def test_build_refuses_a_broken_table(tmp_path):
    (tmp_path / "digits.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"digits\.csv\.gz"):
        build_digits(tmp_path / "digits.csv.gz", tmp_path / "out.npz")


@fast
@given(seeds)
def test_render_matches_roll(seed):
    images, directions, starts = sample_clips(seed)
    video = render_clips(images, directions, starts, frames=5)
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for clip, image, direction, start in zip(video, images, directions, starts, strict=True):
        dy, dx = steps[DIRECTIONS[direction]]
        for time in range(5):
            canvas = torch.zeros(16, 16)
            canvas[:8, :8] = image
            assert torch.equal(clip[time], canvas.roll((int(start[0]) + time * dy, int(start[1]) + time * dx), (0, 1)))


@fast
@given(seeds, st.integers(-50, 50))
def test_motion_wraps_after_sixteen_frames_and_windows_agree(seed, first):
    images, directions, starts = sample_clips(seed)
    video = render_clips(images, directions, starts, frames=21, first_frame=first)
    assert torch.equal(video[:, 16:], video[:, :5])
    assert torch.equal(video, render_clips(images, directions, starts, frames=21, first_frame=first + 16))
    assert torch.equal(video[:, 7:], render_clips(images, directions, starts, frames=14, first_frame=first + 7))
    assert torch.equal(video.sum((2, 3)).std(1) < 1e-4, torch.ones(3, dtype=torch.bool))


def test_render_reports_shapes():
    images, directions, starts = sample_clips(0)
    with pytest.raises(ShapeError, match="one for each of 3 images"):
        render_clips(images, directions[:2], starts, frames=2)
    with pytest.raises(ShapeError, match="at least 1"):
        render_clips(images, directions, starts, frames=0)
    with pytest.raises(ShapeError, match=r"\[B, 8, 8\]"):
        render_clips(images[0], directions, starts, frames=1)


@fast
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_decode_inverts_encode(seed, batch, frames, height, width):
    video = torch.rand(batch, frames, 2 * height, 2 * width, generator=torch.Generator().manual_seed(seed))
    latents = encode_latents(video)
    assert latents.shape == (batch, frames, 4, height, width)
    torch.testing.assert_close(decode_latents(latents), video, rtol=0, atol=1e-6)
    sixteenths = (video * 16).round() / 16
    assert torch.equal(decode_latents(encode_latents(sixteenths)), sixteenths)


def test_latents_follow_the_formula():
    video = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = ((2 * video - 1) + 0.75) / 0.5
    torch.testing.assert_close(encode_latents(video)[0, 0, 1], expected[0, 0, ::2, 1::2])
    torch.testing.assert_close(encode_latents(video)[0, 0, 2], expected[0, 0, 1::2, ::2])
    assert decode_latents(torch.full((1, 1, 4, 1, 1), 99.0)).max() == 1


def test_latents_report_shapes():
    with pytest.raises(ShapeError, match="even"):
        encode_latents(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ShapeError, match="4, H/2, W/2"):
        decode_latents(torch.zeros(1, 1, 3, 4, 4))


@given(st.integers(0, 9), st.sampled_from(DIRECTIONS))
def test_prompts_round_trip(digit, direction):
    text = prompt_text(digit, direction)
    assert parse_prompt(text) == parse_prompt(f"  {text.upper()}\t") == (digit, direction)
    assert prompt_text(digit, DIRECTIONS.index(direction)) == text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a 8 moving up", (8, "up")),
        ("Nine moving downwards.", (9, "down")),
        ("the digit zero moving to the right", (0, "right")),
    ],
)
def test_prompts_are_read_generously(prompt, expected):
    assert parse_prompt(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a 3 movign left", "'a 3 movign left'.*did you mean 'a 3 moving left'"),
        ("a thre moving left", "digit 'thre'; did you mean 'three'"),
        ("a 3 moving north", "direction 'north'; expected one of 'down'"),
        ("a 12 moving up", "digit '12'"),
        ("", "expected 'a <digit> moving <direction>'"),
    ],
)
def test_unreadable_prompts_say_what_was_expected(prompt, message):
    with pytest.raises(DataError, match=message):
        parse_prompt(prompt)


def test_prompt_text_refuses_unknown():
    for digit, direction in ((10, "left"), (1, "north"), (1, 4)):
        with pytest.raises(DataError, match="expected 0 to 9"):
            prompt_text(digit, direction)


def test_tokens_are_orthogonal_and_of_unit_variance():
    embeds = embed_prompts([prompt_text(digit, direction) for digit in range(10) for direction in range(4)])
    assert embeds.shape == (40, 4, 32)
    tokens = torch.unique(embeds.reshape(-1, 32), dim=0)
    assert torch.equal(tokens @ tokens.T, 32 * torch.eye(28))
    assert torch.equal(tokens.var(1, correction=0), torch.ones(28))
    assert torch.equal(embeds[0, :2], embeds[3, :2])
    assert torch.equal(embeds[0, 2:], embeds[36, 2:])


def test_embed_prompts_pins_the_table():
    row = embed_prompts(["a 0 moving left"])[0]
    assert torch.equal(row[0], torch.tensor([1.0, -1.0]).repeat(16))
    assert torch.equal(row[1], torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8))


def test_embed_prompts_edges():
    assert embed_prompts([]).shape == (0, 4, 32)
    assert embed_prompts([""], dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(DataError, match="sequence of prompts"):
        embed_prompts("a 3 moving left")


@fast
@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 999), min_size=1, max_size=8), st.data())
def test_samples_depend_on_seed_and_index_alone(seed, indices, data):
    clips = DigitClips("test", frames=2, seed=seed, size=1000)
    whole = clips.__getitems__(indices)
    order = data.draw(st.permutations(range(len(indices))))
    cut = data.draw(st.integers(0, len(indices)))
    parts = [clips.__getitems__([indices[k] for k in part]) for part in (order[:cut], order[cut:])]
    for key in ("latents", "prompt_embeds", "digit", "direction"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key][list(order)])
    assert parts[0]["prompt"] + parts[1]["prompt"] == [whole["prompt"][k] for k in order]


def test_items_and_batches_agree():
    clips = DigitClips("train", frames=3, seed=4, size=10)
    items, batch = [clips[index] for index in (3, 1)], clips.__getitems__([3, 1])
    assert isinstance(items[0]["digit"], int)
    assert items[0]["latents"].shape == (3, 4, 8, 8)
    collated = collate(items)
    assert collated.keys() == batch.keys()
    for key, value in batch.items():
        assert value == collated[key] if key == "prompt" else torch.equal(value, collated[key])
    assert torch.equal(batch["prompt_embeds"], embed_prompts(batch["prompt"]))
    assert not batch["negative_embeds"].any()
    assert parse_prompt(batch["prompt"][0]) == (batch["digit"][0], DIRECTIONS[batch["direction"][0]])


def test_seeds_and_splits_differ_and_frames_extend():
    def draw(**options):
        return DigitClips(**{"split": "train", "frames": 4, "seed": 0} | options).__getitems__(range(64))

    first = draw()
    assert not torch.equal(first["latents"], draw(seed=1)["latents"])
    assert not torch.equal(first["direction"], draw(split="test")["direction"])
    assert torch.equal(first["latents"], draw(frames=9)["latents"][:, :4])


def test_the_draw_is_pinned_and_even():
    batch = DigitClips("train", frames=1, seed=0).__getitems__(range(8000))
    assert batch["prompt"][:4] == ["a 1 moving up", "a 4 moving down", "a 4 moving left", "a 6 moving up"]
    for key, count in (("digit", 10), ("direction", 4)):
        expected = 8000 / count
        assert (batch[key].bincount() - expected).abs().max() < 6 * expected**0.5
    corners = decode_latents(batch["latents"]).sum((0, 1))
    assert corners.std() / corners.mean() < 0.05


def test_global_random_state_is_left_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    DigitClips("test", frames=2).__getitems__(range(4))
    embed_prompts(["a 3 moving left"])
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_bounds():
    clips = DigitClips("test", frames=1, size=3)
    assert len(clips) == len(list(clips)) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError, match=r"0\.\.2"):
            clips[index]
    with pytest.raises(DataError, match="at least 1"):
        DigitClips("test", frames=0)


def test_data_loader_gives_batches():
    clips = DigitClips("test", frames=2, size=6)
    batches = list(DataLoader(clips, batch_size=4, collate_fn=collate))
    assert [batch["latents"].shape[0] for batch in batches] == [4, 2]
    assert torch.equal(batches[1]["latents"], clips.__getitems__([4, 5])["latents"])
