"""R1 and R2: the exact penalty is the limit of the finite difference, on a real backbone and branch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftk.functional import Key, RecordedKey, classify
from sftk.models import WanConfig, WanModel
from sftk.models.branch import BranchConfig, ClassifierBranch
from sftk.objectives import gradient_penalty

CONFIG = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_dim=2, out_dim=2, freq_dim=8, text_dim=8, text_len=2)


def pair(seed: int = 0, classes: int = 1, dtype: torch.dtype = torch.float64):
    torch.manual_seed(seed)
    backbone = WanModel(CONFIG).to(dtype)
    branch = ClassifierBranch(CONFIG, BranchConfig(layers=(0, 1), registers=2, classes=classes, time_embedding=True)).to(dtype)
    with torch.no_grad():
        for parameter in (*backbone.parameters(), *branch.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone, branch


def inputs(batch: int = 2, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(batch, 2, 2, 4, 4, generator=generator, dtype=dtype)
    return noisy, torch.full((batch, 2), 400.0), torch.randn(batch, 2, 8, generator=generator, dtype=dtype)


def gradients(backbone, branch, noisy, timestep, prompt):
    """[B, classes, latents]: the Jacobian of the logits, column by column."""
    latents = noisy.clone().requires_grad_()
    logits = classify(backbone, branch, latents, timestep, prompt)
    columns = [torch.autograd.grad(column.sum(), latents, retain_graph=True)[0].flatten(1) for column in logits.T]
    return logits, torch.stack(columns, dim=1)


@pytest.mark.parametrize("classes", [1, 3])
def test_exact_is_the_squared_norm_of_the_gradient(classes):
    backbone, branch = pair(classes=classes)
    logits, jacobian = gradients(backbone, branch, *inputs())
    loss, count = gradient_penalty(
        backbone, branch, *inputs(), logits, Key(seed=0, samples=(0, 1)), weight=3.0, penalty="exact"
    )
    assert count == 2 * classes
    torch.testing.assert_close(loss, 3.0 * jacobian.square().sum())


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 1000), direction=st.integers(0, 1000))
def test_the_finite_difference_tends_to_the_exact_value(seed, direction):
    """Along one direction n it tends to `(n . gradient)^2`, with an error that falls with sigma; over an orthonormal basis of
    directions, scaled to unit variance, these squares sum to the exact penalty."""
    backbone, branch = pair(seed)
    noisy, timestep, prompt = inputs(1)
    logits, jacobian = gradients(backbone, branch, noisy, timestep, prompt)
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(direction), dtype=noisy.dtype)
    limit = (jacobian[:, 0] * noise.flatten(1)).sum(dim=1).square().sum()
    errors = []
    for sigma in (1e-2, 1e-3, 1e-4):
        key = RecordedKey(tensors={"penalty_noise": noise})
        loss, _ = gradient_penalty(backbone, branch, noisy, timestep, prompt, logits, key, weight=1.0, sigma=sigma)
        errors.append((loss - limit).abs().item())
    scale = jacobian.square().sum().item()
    assert errors[2] < 1e-2 * max(scale, limit.item())
    assert errors[2] <= errors[0] + 1e-9 * scale


def test_the_mean_over_a_basis_is_the_exact_value():
    backbone, branch = pair(1)
    noisy, timestep, prompt = inputs(1)
    logits = classify(backbone, branch, noisy, timestep, prompt)
    exact, _ = gradient_penalty(backbone, branch, noisy, timestep, prompt, logits, Key(seed=0), weight=1.0, penalty="exact")
    size, total = noisy.numel(), 0.0
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=noisy.dtype))
    for direction in basis.T:
        key = RecordedKey(tensors={"penalty_noise": size**0.5 * direction.reshape(noisy.shape)})
        loss, _ = gradient_penalty(backbone, branch, noisy, timestep, prompt, logits, key, weight=1.0, sigma=1e-6)
        total += loss.item() / size
    assert total == pytest.approx(exact.item(), rel=1e-3)


def test_the_exact_penalty_trains_both_modules():
    backbone, branch = pair()
    noisy, timestep, prompt = inputs()
    logits = classify(backbone, branch, noisy, timestep, prompt)
    loss, _ = gradient_penalty(
        backbone, branch, noisy, timestep, prompt, logits, Key(seed=0, samples=(0, 1)), weight=1.0, penalty="exact"
    )
    weight = branch.classifier[1].weight
    (found,) = torch.autograd.grad(loss, weight)
    step, index = 1e-6, (0, 3)

    def value(change: float) -> float:
        with torch.no_grad():
            weight[index] += change
        result, _ = gradient_penalty(
            backbone, branch, noisy, timestep, prompt, logits, Key(seed=0, samples=(0, 1)), weight=1.0, penalty="exact"
        )
        with torch.no_grad():
            weight[index] -= change
        return result.item()

    assert found[index].item() == pytest.approx((value(step) - value(-step)) / (2 * step), rel=1e-5)


def test_weight_zero_makes_no_pass():
    def fail(*_, **__):
        raise AssertionError("called")

    loss, count = gradient_penalty(fail, fail, *inputs(), torch.zeros(2, 1), Key(seed=0, samples=(0, 1)))
    assert (loss, count) == (0, 2)


def test_penalties_of_other_names_have_other_perturbations():
    backbone, branch = pair()
    logits, _ = gradients(backbone, branch, *inputs())
    key = Key(seed=0, samples=(0, 1))
    first, again, second = (
        gradient_penalty(backbone, branch, *inputs(), logits, key, weight=1.0, name=name)[0] for name in ("r1", "r1", "r2")
    )
    assert first == again
    assert (first - second).abs() > 1e-6
