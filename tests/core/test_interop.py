"""Graphs as modules of tensordict: its calling conventions, optional inputs, host values and submodules."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

from sftk.core.graph import Graph
from sftk.core.transform import transform
from sftk.errors import ShapeError, SpecError

X = torch.tensor([1.0, 2.0])


@pytest.fixture
def graph(nothing_stays_registered):
    @transform(out="y", kind="per_sample")
    def scaled_for_test(x, scale=None):
        return x * (1 if scale is None else scale)

    @transform(out="z", models=("net",), kind="per_sample")
    def called_for_test(y, net):
        return net(y)

    return Graph([scaled_for_test, called_for_test], inputs=("x",), optional=("scale",), outputs=("z",))


def test_an_optional_input_may_be_there(graph):
    module = graph.to_tdmodule({"net": torch.neg})
    assert (module.in_keys, module.out_keys) == (["x", "scale"], ["z"])
    without, given = TensorDict({"x": X}), TensorDict({"x": X, "scale": torch.tensor(3.0)})
    assert module(without)["z"].tolist() == [-1, -2]
    assert module(given)["z"].tolist() == [-3, -6]
    assert module(given) is given
    host = TensorDict({"x": X})
    host.set_non_tensor("scale", 2.0)
    assert module(host)["z"].tolist() == [-2, -4]


def test_calls_with_tensors_instead_of_a_tensordict(graph):
    module = graph.to_tdmodule({"net": torch.neg})
    assert module(X).tolist() == module(x=X).tolist() == [-1, -2]
    assert module(X, torch.tensor(3.0)).tolist() == module(scale=torch.tensor(3.0), x=X).tolist() == [-3, -6]
    out = TensorDict()
    assert module(TensorDict({"x": X}), tensordict_out=out) is out
    assert set(out.keys()) == {"z"}


def test_in_a_sequence_another_module_makes_the_optional_input(graph):
    first = TensorDictModule(lambda x: x.sum(), in_keys=["x"], out_keys=["scale"])
    chain = TensorDictSequential(first, graph.to_tdmodule({"net": torch.neg}))
    assert chain(TensorDict({"x": X}))["z"].tolist() == [-3, -6]


def test_a_model_of_two_nodes_is_one_submodule(graph):
    net = torch.nn.Linear(2, 2)
    twice = Graph([graph, graph.nodes[1].op.node(in_={"y": "z"}, out={"z": "again"})], inputs=("x",))
    module = twice.to_tdmodule({"net": net})
    assert {id(p) for p in module.parameters()} == {id(p) for p in net.parameters()}
    assert len(module.state_dict()) == 2
    assert torch.equal(module(TensorDict({"x": X}))["again"], net(net(X)))


def test_host_values_come_back(nothing_stays_registered):
    @transform(out="plan", kind="reduced")
    def planned_for_test(x):
        return (len(x), "words")

    module = Graph([planned_for_test], inputs=("x",)).to_tdmodule()
    assert module(TensorDict({"x": X}))["plan"] == (2, "words")


def test_what_is_missing_is_named(graph):
    with pytest.raises(SpecError, match=r"needs models for \['net'\], found \[\]"):
        graph.to_tdmodule()
    with pytest.raises(ShapeError, match=r"needs \['x'\] in its state, found \['scale'\]"):
        graph.to_tdmodule({"net": torch.neg})(TensorDict({"scale": X}))
