"""The classifier branch: sizes from its config, layers of the backbone, errors."""

import attrs
import pytest
import torch

from sftk.errors import ShapeError, SpecError
from sftk.functional import classify
from sftk.models import WanConfig, WanModel
from sftk.models.branch import BranchConfig, ClassifierBranch

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=3, num_layers=3, in_dim=2, out_dim=2, freq_dim=8, text_dim=8, text_len=2)


def features(count: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, 8, CONFIG.dim) for _ in range(count))


@pytest.mark.parametrize("time_embedding", [False, True])
@pytest.mark.parametrize("classes", [1, 4])
def test_sizes_come_from_the_config(time_embedding, classes):
    size = BranchConfig(
        layers=(0, -1), registers=3, num_heads=2, ffn_dim=7, hidden_dim=5, classes=classes, time_embedding=time_embedding
    )
    branch = ClassifierBranch(CONFIG, size)
    assert branch.features_at == (0, 2)
    assert branch(features(2), torch.zeros(2, 3)).shape == (2, classes)
    shapes = {name: tuple(p.shape) for name, p in branch.named_parameters()}
    assert shapes["readers.0.registers"] == (1, 3, 24)
    assert shapes["readers.1.ffn.1.weight"] == (7, 24)
    assert shapes["classifier.1.weight"] == (5, 24 * (6 + time_embedding))


def test_only_a_time_embedding_sees_the_timestep():
    for sees in (False, True):
        torch.manual_seed(0)
        branch = ClassifierBranch(CONFIG, BranchConfig(layers=(1,), time_embedding=sees))
        hidden = features(1)
        early, late = (branch(hidden, torch.full((2, 3), t)) for t in (100.0, 900.0))
        assert bool((early - late).abs().max() > 1e-6) == sees


def test_its_time_is_the_mean_of_the_frames():
    torch.manual_seed(0)
    branch = ClassifierBranch(CONFIG, BranchConfig(layers=(1,), time_embedding=True))
    hidden = features(1)
    mixed, plain = (branch(hidden, torch.tensor(t).expand(2, -1)) for t in ([100.0, 300.0, 800.0], [400.0] * 3))
    torch.testing.assert_close(mixed, plain)
    torch.testing.assert_close(branch(hidden, torch.full((2,), 400.0)), plain)


def test_it_begins_near_logits_of_0():
    torch.manual_seed(0)
    branch = ClassifierBranch(attrs.evolve(CONFIG, dim=192), BranchConfig(layers=(1,), hidden_dim=400))
    last = branch.classifier[-1]
    assert isinstance(last, torch.nn.Linear)
    assert last.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not last.bias.any()


def test_it_reads_the_layers_that_it_names():
    """A change behind the deepest layer that it reads does not reach the logits, one before it does."""
    torch.manual_seed(0)
    backbone = WanModel(CONFIG)
    branch = ClassifierBranch(CONFIG, BranchConfig(layers=(1,)))
    call = (torch.randn(1, 3, 2, 4, 4), torch.full((1, 3), 500.0), torch.randn(1, 2, 8))
    before = classify(backbone, branch, *call)
    with torch.no_grad():
        backbone.blocks[2].ffn[0].weight.add_(1.0)
    torch.testing.assert_close(classify(backbone, branch, *call), before, rtol=0, atol=0)
    with torch.no_grad():
        backbone.blocks[1].ffn[0].weight.add_(1.0)
    assert (classify(backbone, branch, *call) - before).abs().max() > 1e-4


def test_the_order_of_tokens_does_not_matter_but_their_values_do():
    branch = ClassifierBranch(CONFIG, BranchConfig(layers=(0,)))
    (hidden,) = features(1)
    timestep = torch.zeros(2, 1)
    logits = branch((hidden,), timestep)
    torch.testing.assert_close(branch((hidden[:, torch.randperm(8)],), timestep), logits, rtol=1e-4, atol=1e-6)
    assert (branch((hidden + torch.randn_like(hidden),), timestep) - logits).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": ()}, ValueError, "`layers` is empty"),
        ({"layers": (1,), "registers": 0}, ValueError, "registers must be at least 1, found 0"),
        ({"layers": (3,)}, SpecError, r"layers \[3\] of a backbone of 3; expected -3 to 2"),
        ({"layers": (0,), "num_heads": 5}, SpecError, "5 heads do not divide the backbone's width 24"),
    ],
)
def test_sizes_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        ClassifierBranch(CONFIG, BranchConfig(**options))


def test_another_number_of_hidden_states():
    with pytest.raises(ShapeError, match="reads 1 hidden states, found 2"):
        ClassifierBranch(CONFIG, BranchConfig(layers=(0,)))(features(2), torch.zeros(2, 1))
