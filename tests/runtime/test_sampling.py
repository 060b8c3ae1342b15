"""Sampling: keyed by place, so that the batch size does not matter; wrong options are named."""

from __future__ import annotations

import pytest
import torch

from sftk.data.sources import source
from sftk.errors import SpecError
from sftk.runtime.evaluate import DigitsEvaluation
from sftk.runtime.port import Port
from sftk.runtime.sampling import sample_latents
from sftk.spec.convert import structure
from sftk.spec.sampling import CausalOdeSampling, StudentSampling, TeacherSampling, sampler_graph, sampling_problems
from sftk.spec.source import parse_yaml

PROMPTS = ["a 3 moving left", "a 5 moving up", "a 0 moving right"]
STUDENT = StudentSampling(steps=(1000, 500), shift=3.0, window=6)
CAUSAL = CausalOdeSampling(method="causal_ode", steps=2, shift=3.0, guidance=2.0, window=6)
students = pytest.mark.parametrize("graph", [sampler_graph(STUDENT), sampler_graph(CAUSAL)], ids=["few_step", "causal_ode"])


def sample(model, graph, prompts=PROMPTS, frames=6, seed=1, **options):
    port, cpu = Port(model, None), torch.device("cpu")
    return sample_latents(graph, port, prompts, source("digits"), (frames, 4, 8, 8), seed=seed, device=cpu, **options)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(torch.float32, text_dim=32).requires_grad_(False)


@pytest.mark.parametrize(
    "graph",
    [sampler_graph(STUDENT), sampler_graph(CAUSAL), sampler_graph(TeacherSampling(steps=2))],
    ids=["few_step", "causal_ode", "teacher"],
)
def test_the_batch_does_not_matter_and_the_seed_does(model, graph):
    whole = sample(model, graph)
    assert (whole.shape, whole.dtype) == ((3, 6, 4, 8, 8), torch.float32)
    torch.testing.assert_close(sample(model, graph, batch=2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample(model, graph, PROMPTS[:1]), whole[:1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sample(model, graph, seed=2), whole, atol=0.1)
    assert not torch.allclose(sample(model, graph, PROMPTS[::-1]), whole, atol=1e-3)


@students
def test_a_long_video_begins_like_a_short_one(model, graph):
    torch.testing.assert_close(sample(model, graph, frames=6), sample(model, graph, frames=12)[:, :6])


@students
def test_given_latents_are_continued(model, graph):
    given = torch.zeros(3, 3, 4, 8, 8)
    found = sample(model, graph, extra={"initial_latents": given})
    assert found.shape[1] == 9
    assert torch.equal(found[:, :3], given)


@pytest.mark.parametrize(
    ("sampling", "wrong"),
    [
        (StudentSampling(), []),
        (StudentSampling(steps=()), ["steps"]),
        (StudentSampling(rope="x", schedule="y"), ["rope", "schedule"]),
        (StudentSampling(window=2, sink=2, frames_per_block=4), ["frames_per_block", "window"]),
        (CausalOdeSampling(method="causal_ode"), []),
        (CausalOdeSampling(method="causal_ode", steps=0, frames_per_block=4, rope="x"), ["frames_per_block", "rope", "steps"]),
        (TeacherSampling(steps=0), ["steps"]),
    ],
)
def test_problems_are_named_by_option(sampling, wrong):
    assert sorted(problem.path[-1] for problem in sampling_problems(sampling, 6)) == wrong


def test_one_causal_block_without_guidance_is_what_the_teacher_samples(model):
    """With one block there is no context, and block-causal attention is bidirectional."""
    causal = sampler_graph(CausalOdeSampling(method="causal_ode", steps=5, shift=3.0, guidance=1.0, frames_per_block=6))
    whole = sampler_graph(TeacherSampling(steps=5, shift=3.0, guidance=1.0))
    torch.testing.assert_close(sample(model, causal), sample(model, whole), rtol=1e-5, atol=1e-5)


def test_method_chooses_the_class():
    def read(text):
        return structure(parse_yaml(f"student_sampling: {text}", "x.yaml"), DigitsEvaluation).student_sampling

    assert read("{steps: [1000]}") == StudentSampling(steps=(1000.0,))
    assert read("{method: causal_ode, steps: 3}") == CausalOdeSampling(method="causal_ode", steps=3)
    with pytest.raises(SpecError, match=r"unknown key 'warp' @ \$.student_sampling \(x.yaml:1\)"):
        read("{method: causal_ode, warp: true}")
    with pytest.raises(SpecError, match='expected one of "few_step", "causal_ode", found the string "casual_ode"') as caught:
        read("{method: casual_ode, steps: 3}")
    assert len(caught.value.problems) == 1
    with pytest.raises(SpecError, match=r"expected a list, found the integer 3 @ \$.student_sampling.steps"):
        read("{steps: 3}")
