"""Backward by replay: the gradient of the graph itself, and nothing kept while the loss is computed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sftk.core import Fold, Graph, is_replayable, registry, replayed, transform


@pytest.fixture(scope="module")
def toys():
    """`chain` steps carry a value on; `square` is a step whose backward may wait, `shift_on` an ordinary one."""

    @transform(out=("y", "side"), kind="per_sample", models=("model",), example=None, replay=True)
    def replay_square(model, x, number):
        """A step with an output that is used and one that may not be."""
        y = model(x) ** 2 * number
        return y, {"doubled": 2 * y, "name": "kept"}

    @transform(out="x", kind="per_sample")
    def replay_carry(y, side):
        """Hands a mixture on to the next turn."""
        return y.sin() + side["doubled"] ** 2

    yield replay_square, replay_carry
    registry.unregister("replay_square")
    registry.unregister("replay_carry")


def chain(toys, grad=True):
    """Turns that each read the one before, with gradient all the way."""
    square, carry = toys
    body = [square.node(grad=grad), carry]
    fold = Fold(body, over="numbers", item="number", carry=("x",), collect={"y": "ys"})
    return Graph([fold], inputs=("numbers", "x"), rebind=("x",), outputs=("ys", "x"))


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 3, dtype=torch.float64)


def gradients(graph, tape, net):
    x = torch.full((2, 3), 0.3, dtype=torch.float64, requires_grad=True)
    out = graph.run({"numbers": (1.0, 2.0, 3.0), "x": x}, {"model": net})
    (sum(y.sum() for y in out["ys"]) + out["x"].square().sum()).backward()
    if tape is not None:
        tape.pull_back()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in net.parameters())]


def test_gradients_through_steps_that_read_one_another(toys):
    graph = chain(toys)
    played, tape = replayed(graph)
    assert is_replayable(graph)
    for plain, found in zip(gradients(graph, None, model()), gradients(played, tape, model()), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-13, atol=0)
    assert len(tape) == 0


def test_the_graph_and_its_values_stay_what_they_were(toys):
    graph, net = chain(toys), model()
    played, _ = replayed(graph)
    values = {"numbers": (1.0, 2.0), "x": torch.ones(2, 3, dtype=torch.float64)}
    plain, found = graph.run(values, {"model": net}), played.run(values, {"model": net})
    assert torch.equal(plain["x"], found["x"])
    assert (played.inputs, played.outputs, played.ports) == (graph.inputs, graph.outputs, graph.ports)
    assert plain["x"].grad_fn is not None
    assert [type(node.op).__name__ for node in graph.nodes[0].op.nodes] == ["FunctionTransform"] * 2  # pyright: ignore


def test_nothing_is_remembered_until_the_loss_is_known(toys):
    """No tensor is saved for backward by the steps themselves, and an output that nobody reads is freed."""
    square, _ = toys
    graph = Graph([square.node(out={"side": "side"})], inputs=("x", "number"), outputs=("y",))
    played, tape = replayed(graph)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = played.run({"x": torch.ones(2, 3, dtype=torch.float64), "number": 2.0}, {"model": model()})
        assert saved == []
        graph.run({"x": torch.ones(2, 3, dtype=torch.float64), "number": 2.0}, {"model": model()})
        assert saved
    alive = weakref.ref(out["y"])
    del out
    gc.collect()
    assert alive() is None, "the tape keeps no output alive"
    assert len(tape) == 1


def test_only_steps_with_gradient_are_played_again(toys):
    graph = chain(toys, grad=False)
    assert not is_replayable(graph)
    played, tape = replayed(chain(toys))
    with torch.no_grad():
        played.run({"numbers": (1.0,), "x": torch.ones(2, 3, dtype=torch.float64)}, {"model": model()})
    assert len(tape) == 0


def test_unused_outputs_and_frozen_models_cost_nothing(toys):
    played, tape = replayed(chain(toys))
    net = model().requires_grad_(False)
    out = played.run({"numbers": (1.0, 2.0), "x": torch.ones(2, 3, dtype=torch.float64)}, {"model": net})
    out["x"].sum().backward()
    tape.pull_back()
    assert all(p.grad is None for p in net.parameters())
    played.run({"numbers": (1.0, 2.0), "x": torch.ones(2, 3, dtype=torch.float64)}, {"model": model()})
    tape.pull_back()  # no loss was differentiated
    assert len(tape) == 0


def test_the_last_backward_pass_is_announced(toys):
    played, tape = replayed(chain(toys))
    net, told = model(), []
    out = played.run({"numbers": (1.0, 2.0, 3.0), "x": torch.ones(2, 3, dtype=torch.float64)}, {"model": net})
    torch.stack(out["ys"]).sum().backward()

    def gradient():
        assert net.weight.grad is not None
        return net.weight.grad.clone()

    tape.pull_back(lambda: told.append(gradient()))
    (before,) = told
    assert not torch.equal(before, gradient())
