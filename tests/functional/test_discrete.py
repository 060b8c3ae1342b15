"""Draws from lists of timesteps: distribution, blocks, the ends of the list."""

import pytest
import torch

from sftk.core import Graph
from sftk.errors import ShapeError, SpecError
from sftk.functional import Key, draw_grid_step, draw_step, draw_timestep, pick_ode_states, plan_ode
from sftk.functional.schedule import inference_timesteps, warp_steps

STEPS = (1000.0, 750.0, 500.0, 250.0, 0.0)
MANY = Key(seed=2, samples=tuple(range(4000)))


def like(batch: int, frames: int = 7) -> torch.Tensor:
    return torch.zeros(batch, frames, 1)


@pytest.mark.parametrize(("keep_zero", "count"), [(True, 5), (False, 4)])
def test_every_step_is_equally_likely(keep_zero, count):
    index, timestep = draw_step(MANY, like(4000, 3), steps=STEPS, shift=5.0, keep_zero=keep_zero)
    share = torch.bincount(index[:, 0], minlength=count) / 4000
    assert index.max() == count - 1
    assert (share - 1 / count).abs().max() < 4 * (1 / count / 4000) ** 0.5
    torch.testing.assert_close(timestep, torch.tensor(warp_steps(STEPS, 5.0))[index])


def test_frames_of_a_block_share_their_step():
    index, _ = draw_step(MANY, like(4000), steps=STEPS, frames_per_block=3, independent_first_frame=True)
    assert torch.equal(index[:, 1:4], index[:, 1:2].expand(-1, 3))
    assert torch.equal(index[:, 4:7], index[:, 4:5].expand(-1, 3))
    assert not torch.equal(index[:, 1], index[:, 4])
    assert not torch.equal(index[:, 0], index[:, 1])
    frames, _ = draw_step(MANY, like(4000), steps=STEPS, per="frame")
    assert not torch.equal(frames[:, 1], frames[:, 2])
    whole, _ = draw_step(MANY, like(4000), steps=STEPS, per="sample")
    assert torch.equal(whole, whole[:, :1].expand(-1, 7))


def test_image_to_video_gives_the_first_frame_clean():
    index, timestep = draw_step(
        MANY, like(4000), steps=STEPS, keep_zero=True, independent_first_frame=True, image_to_video=True
    )
    assert (index[:, 0] == 4).all()
    assert (timestep[:, 0] == 0).all()
    assert timestep[:, 1].unique().numel() == 5


def test_a_list_without_warp_is_used_as_it_stands():
    _, timestep = draw_step(MANY, like(4000, 3), steps=(900.0, 300.0), shift=5.0, warp=False)
    assert timestep.unique().tolist() == [300.0, 900.0]


def test_states_are_those_of_the_steps():
    states = torch.randn(2, 5, 4, 1, 2, 2)
    index = torch.tensor([[0, 3, 4, 1], [4, 4, 0, 2]])
    timestep = torch.tensor(STEPS)[index]
    noisy, x0, mask = pick_ode_states(states, index, timestep)
    for b in range(2):
        for f in range(4):
            assert torch.equal(noisy[b, f], states[b, index[b, f], f])
            assert mask[b, f] == (index[b, f] < 4)
    assert torch.equal(x0, states[:, -1])


def test_states_of_another_length():
    with pytest.raises(ShapeError, match=r"must be \[B, S, 4, C, H, W\], found \[1, 5, 3, 1, 2, 2\]"):
        pick_ode_states(torch.zeros(1, 5, 3, 1, 2, 2), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4))


def test_intervals_are_neighbours_of_the_solvers_grid():
    timestep, following = draw_grid_step(MANY, like(4000, 3), intervals=6, shift=3.0)
    grid = torch.tensor((*inference_timesteps(6, 3.0), 0.0))
    place = (timestep[..., None] == grid).long().argmax(dim=-1)
    torch.testing.assert_close(grid[place], timestep, rtol=0, atol=0)
    torch.testing.assert_close(grid[place + 1], following, rtol=0, atol=0)
    assert place.unique().tolist() == list(range(6))


@pytest.mark.parametrize("op", [draw_step, draw_grid_step, draw_timestep])
def test_blocks_matter_only_where_draws_are_by_block(op):
    more = {"steps": (1000, 500)} if op is draw_step else {}
    for per in ("sample", "frame"):
        Graph([op.node(per=per, **more)], inputs=("key", "like"), frames=7)
    with pytest.raises(SpecError, match="7 frames do not divide into blocks of 3"):
        Graph([op.node(per="block", **more)], inputs=("key", "like"), frames=7)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (draw_step.node(steps=(0,)), "the step list is empty"),
        (draw_step.node(steps=()), "the step list is empty"),
        (draw_step.node(steps=(1000,), shift=0.0), "a shift is above 0"),
        (draw_step.node(steps=(1000,), keep_zero=True, image_to_video=True), "needs a step list that ends in 0"),
        (draw_grid_step.node(shift=-1.0), "a shift is above 0"),
        (plan_ode.node(shift=0.0), "a shift is above 0"),
    ],
)
def test_options_that_make_no_sense(node, message):
    with pytest.raises(SpecError, match=message):
        Graph([node], inputs=("key", "like"))
