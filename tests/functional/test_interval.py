from __future__ import annotations

import pytest
import torch

from sftk.core.graph import Graph
from sftk.errors import SpecError
from sftk.functional import Key, draw_interval, ramp, shift_sigma
from sftk.functional.plan import Step
from sftk.functional.solvers import predict_step, solver_step

KEY = Key(seed=1, samples=tuple(range(2000)))
LIKE = torch.zeros(2000, 3, 1)


def test_times_are_uniform_before_the_shift_and_shared_by_the_frames():
    plain, shifted = draw_interval(KEY, LIKE, empty=0.0), draw_interval(KEY, LIKE, empty=0.0, shift=3.0)
    timestep, interval = (x[:, 0] / 1000 for x in plain)
    assert all(torch.equal(x, x[:, :1].expand_as(x)) for x in plain)
    # The larger and the smaller of two uniform numbers have means 2/3 and 1/3.
    assert timestep.mean().item() == pytest.approx(2 / 3, abs=0.02)
    assert (timestep - interval).mean().item() == pytest.approx(1 / 3, abs=0.02)
    torch.testing.assert_close(shifted[0][:, 0] / 1000, shift_sigma(timestep, 3.0))
    torch.testing.assert_close((shifted[0] - shifted[1])[:, 0] / 1000, shift_sigma(timestep - interval, 3.0), atol=1e-5, rtol=0)


def test_the_share_of_empty_intervals():
    _, interval = draw_interval(KEY, LIKE, empty=0.75)
    assert (interval[:, 0] == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert (draw_interval(KEY, LIKE, empty=1.0)[1] == 0).all()


@pytest.mark.parametrize("deviation", [1.0, 0.5])
def test_logit_normal_times(deviation):
    timestep, interval = draw_interval(KEY, LIKE, empty=0.0, spread=(-0.4, deviation))
    both = torch.cat([timestep[:, 0], (timestep - interval)[:, 0]]) / 1000
    assert both.logit().mean().item() == pytest.approx(-0.4, abs=0.05)
    assert both.logit().std().item() == pytest.approx(deviation, abs=0.05)


@pytest.mark.parametrize("options", [{"empty": 1.5}, {"shift": 0.0}, {"spread": (0.0, 0.0)}])
def test_options_that_make_no_sense(options):
    with pytest.raises(SpecError):
        Graph([draw_interval.node(**options)], inputs=("key", "like"))


def test_ramp():
    assert [ramp(Key(seed=0, update=i), updates=4) for i in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert ramp(Key(seed=0)) == 1.0
    with pytest.raises(SpecError, match="at least 0 updates"):
        Graph([ramp.node(updates=-1)], inputs=("key",))


def test_a_step_with_the_average_velocity_is_exact(randn):
    """A model that knows dx/ds = 2s, averaged from r to t as t + r: one step lands where the path does, Euler's does not."""

    def model(latents, timestep, prompt_embeds, *, cache=None, positions=None, interval=None):
        flow = 2 * timestep if interval is None else 2 * timestep - interval
        return (flow / 1000)[:, :, None, None, None].expand_as(latents), (), ()

    x, embeds = randn(1, 3, 4, 2, 2), randn(1, 2, 8)
    step = Step(index=0, timestep=800.0, next_timestep=200.0)
    expected = x - (0.8**2 - 0.2**2)

    def stepped(**options):
        return solver_step(x, predict_step(model, x, step, embeds, embeds, **options), step)[0]

    torch.testing.assert_close(stepped(average=True), expected)
    assert (stepped() - expected).abs().min() > 0.3
