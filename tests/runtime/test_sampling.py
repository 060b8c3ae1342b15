"""Sampling: keyed by place, so that the batch size does not matter; wrong options are named."""

from __future__ import annotations

import pytest
import torch

from sftk.data.sources import source
from sftk.runtime.port import Port
from sftk.runtime.sampling import (
    StudentSampling,
    TeacherSampling,
    sample_latents,
    sampling_problems,
    student_graph,
    teacher_graph,
)

PROMPTS = ["a 3 moving left", "a 5 moving up", "a 0 moving right"]
STUDENT = StudentSampling(steps=(1000, 500), shift=3.0, window=6)


def sample(model, graph, prompts=PROMPTS, frames=6, seed=1, **options):
    port, cpu = Port(model, None), torch.device("cpu")
    return sample_latents(graph, port, prompts, source("digits"), (frames, 4, 8, 8), seed=seed, device=cpu, **options)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(torch.float32, text_dim=32).requires_grad_(False)


@pytest.mark.parametrize("graph", [student_graph(STUDENT), teacher_graph(TeacherSampling(steps=2))], ids=["student", "teacher"])
def test_the_batch_does_not_matter_and_the_seed_does(model, graph):
    whole = sample(model, graph)
    assert (whole.shape, whole.dtype) == ((3, 6, 4, 8, 8), torch.float32)
    torch.testing.assert_close(sample(model, graph, batch=2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample(model, graph, PROMPTS[:1]), whole[:1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sample(model, graph, seed=2), whole, atol=0.1)
    assert not torch.allclose(sample(model, graph, PROMPTS[::-1]), whole, atol=1e-3)


def test_a_long_video_begins_like_a_short_one(model):
    graph = student_graph(STUDENT)
    torch.testing.assert_close(sample(model, graph, frames=6), sample(model, graph, frames=12)[:, :6])


def test_given_latents_are_continued(model):
    graph = student_graph(STUDENT)
    given = torch.zeros(3, 3, 4, 8, 8)
    found = sample(model, graph, extra={"initial_latents": given})
    assert found.shape[1] == 9
    assert torch.equal(found[:, :3], given)


@pytest.mark.parametrize(
    ("spec", "sampling", "wrong"),
    [
        ("specs/rollout.yaml", StudentSampling(), []),
        ("specs/rollout.yaml", StudentSampling(steps=()), ["steps"]),
        ("specs/rollout.yaml", StudentSampling(rope="x", schedule="y"), ["rope", "schedule"]),
        ("specs/rollout.yaml", StudentSampling(window=2, sink=2, frames_per_block=4), ["frames_per_block", "window"]),
        ("specs/sample_ode.yaml", TeacherSampling(steps=0), ["steps"]),
    ],
)
def test_problems_are_named_by_option(spec, sampling, wrong):
    assert sorted(problem.path[-1] for problem in sampling_problems(spec, sampling, 6)) == wrong
