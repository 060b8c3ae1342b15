"""Graphs and folds: what they run, what they leave alone, and every mistake that they report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from sftk.core import Fold, Graph, registry, to_state, transform
from sftk.errors import ShapeError, SpecError
from sftk.functional import add_noise, flow_target, interpolate, plan_rollout


def local(**declared: Any):
    """`@transform` for this file only: the name is not left in the registry."""

    def decorate(fn):
        made = transform(**declared)(fn)
        registry.unregister(made.name)
        return made

    return decorate


@local(out="y", kind="per_sample")
def double(x, *, times: float = 2.0):
    """times x."""
    return x * times


@local(out=("low", "high"), kind="per_sample")
def split(x):
    """Two results."""
    return x - 1, x + 1


@local(out="z", kind="per_sample", models=("net",))
def apply(net, y, bonus=None):
    """A model's answer, with an optional bonus."""
    return net(y) if bonus is None else net(y) + bonus


@local(out="total", kind="host")
def accumulate(total, number):
    """A running sum."""
    return total + number


@local(out="y", kind="per_sample")
def choose(x, *, mode: Literal["a", "b"], sizes: tuple[int, ...] = (1,)):
    """Needs an option."""
    return x


def problems(*nodes: Any, inputs=("x",), **rest: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        Graph(nodes, inputs=inputs, **rest)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


# Errors, one by one


@pytest.mark.parametrize(
    ("nodes", "rest", "message"),
    [
        (
            [flow_target],
            {"inputs": ("x0", "nois")},
            "flow_target reads 'noise', which nothing before it writes @ $.nodes[0]; did you mean 'nois'?",
        ),
        (
            [flow_target.node(in_={"noise": "eps"})],
            {"inputs": ("x0", "noise")},
            "flow_target reads 'eps', which nothing before it writes @ $.nodes[0].in.noise; rename it with in: {noise: ...}",
        ),
        (
            [flow_target.node(in_={"x0": "x"})],
            {"inputs": ("x",), "optional": ("noise",)},
            "flow_target reads 'noise', which is an optional input of this graph @ $.nodes[0].in; "
            "rename it with in: {noise: ...}",
        ),
        (
            [double, double],
            {},
            "double writes 'y', which is already written @ $.nodes[1].out; rename it with out: {y: ...}",
        ),
        (
            [double.node(out={"y": "x"})],
            {},
            "double writes 'x', which is already written @ $.nodes[0].out.y; rename it with out: {y: ...}",
        ),
        (
            [double],
            {"optional": ("y",)},
            "double writes 'y', which is already written @ $.nodes[0].out; rename it with out: {y: ...}",
        ),
        (
            [double.node(time=3.0)],
            {},
            "double has no option 'time' @ $.nodes[0].with.time; did you mean 'times'?",
        ),
        ([split.node(qqqqqq=3.0)], {}, "split has no option 'qqqqqq' @ $.nodes[0].with.qqqqqq; it has none"),
        (
            [double.node(times="2")],
            {},
            "the option 'times' of double takes a number, found the string '2' @ $.nodes[0].with.times",
        ),
        ([choose], {}, "choose needs the option 'mode' @ $.nodes[0].with; add with: {mode: ...}"),
        (
            [choose.node(mode="c")],
            {},
            "the option 'mode' of choose takes one of 'a', 'b', found the string 'c' @ $.nodes[0].with.mode",
        ),
        (
            [double.node(in_={"xx": "x"})],
            {},
            "double has no argument 'xx' @ $.nodes[0].in.xx; did you mean 'x'?",
        ),
        (
            [split.node(out={"lowe": None})],
            {},
            "split has no result 'lowe' @ $.nodes[0].out.lowe; did you mean 'low'?",
        ),
        (
            [double, apply.node(models={"nett": "generator"})],
            {},
            "apply has no model port 'nett' @ $.nodes[1].models.nett; did you mean 'net'?",
        ),
        (
            [double, apply.node(models={"net": "generater"})],
            {"ports": ("generator",)},
            "the model port 'net' of apply is bound to 'generater', which is no role of this graph @ $.nodes[1].models.net; "
            "did you mean 'generator'?",
        ),
        (
            [double, apply],
            {"ports": ()},
            "the model port 'net' of apply is not bound @ $.nodes[1]; bind it with models: {net: ...}",
        ),
        (
            [double, apply.node(in_={"bonus": "bonsu"})],
            {"inputs": ("x", "bonus")},
            "apply binds its optional input 'bonus' to 'bonsu', which nothing before it writes @ $.nodes[1].in.bonus; "
            "did you mean 'bonus'?",
        ),
        ([double], {"outputs": ("yy",)}, "the output 'yy' is written by no node @ $.outputs[0]; did you mean 'y'?"),
        ([double], {"inputs": ("x", "x")}, "the input 'x' is declared twice @ $.inputs"),
        ([double], {"optional": ("x",)}, "the input 'x' is declared twice @ $.inputs"),
        (
            [plan_rollout.node(steps=(500, 750))],
            {"inputs": ("key", "noise")},
            "steps must descend, found 750 after 500 in [500, 750] @ $.nodes[0].with.steps",
        ),
        (
            [plan_rollout.node(steps=(1000,), frames_per_block=4)],
            {"inputs": ("key", "noise"), "frames": 21},
            "21 frames do not divide into blocks of 4; take 20 or 24 frames @ $.nodes[0].with.frames_per_block",
        ),
        (
            [Fold([accumulate], over="items", item="number", carry=("total",))],
            {"inputs": ("item", "total")},
            "folds over 'items', which nothing before it writes @ $.nodes[0].fold.over; did you mean 'item'?",
        ),
        (
            [Fold([accumulate], over="items", item="number", carry={"total": "start"})],
            {"inputs": ("items", "starts")},
            "carries 'start', which nothing before the fold writes @ $.nodes[0].fold.carry.total; did you mean 'starts'?",
        ),
        (
            [Fold([double.node(in_={"x": "number"})], over="items", item="number", carry=("total",))],
            {"inputs": ("items", "total")},
            "carries 'total', which its body never writes @ $.nodes[0].fold.carry.total",
        ),
        (
            [Fold([accumulate], over="items", item="number", carry=("total",), collect={"totl": "all"})],
            {"inputs": ("items", "total")},
            "collects 'totl', which its body never writes @ $.nodes[0].fold.collect.totl; did you mean 'total'?",
        ),
        (
            [
                Fold([accumulate], over="items", item="number", carry={"total": "start"}),
                accumulate.node(in_={"number": "start"}),
            ],
            {"inputs": ("items", "start")},
            "accumulate writes 'total', which is already written @ $.nodes[1].out; rename it with out: {total: ...}",
        ),
        (
            [Fold([accumulate.node(in_={"number": "nmber"})], over="items", item="number", carry=("total",))],
            {"inputs": ("items", "total")},
            "accumulate reads 'nmber', which nothing before it writes @ $.nodes[0].fold.nodes[0].in.number; "
            "did you mean 'number'?",
        ),
    ],
)
def test_one_problem(nodes, rest, message):
    assert problems(*nodes, **rest) == [message]


def test_all_problems_are_reported_at_once():
    found = problems(
        double.node(time=1.0),
        double.node(in_={"x": "missing"}, out={"y": "second"}),
        apply.node(in_={"y": "second"}, models={"nett": "a"}),
        Fold([accumulate], over="items", item="number", carry=("total",)),
        outputs=("nothing",),
        ports=("generator",),
    )
    assert [text.partition(" @ ")[2].partition(";")[0] for text in found] == [
        "$.nodes[0].with.time",
        "$.nodes[1].in.x",
        "$.nodes[2].models.nett",
        "$.nodes[2]",
        "$.nodes[3].fold.over",
        "$.nodes[3].fold.carry.total",
        "$.outputs[0]",
    ]


def test_an_open_ended_graph_says_nothing_of_missing_keys():
    node = double.node(time=1.0)
    found = problems(node, outputs=("nothing",), open_ended=True)
    assert found == ["double has no option 'time' @ $.nodes[0].with.time; did you mean 'times'?"]


# Running


def test_renames_drops_and_keeps_inputs():
    graph = Graph([split.node(in_={"x": "a"}, out={"low": None, "high": "b"})], inputs=("a",))
    state = {"a": 1, "other": "kept"}
    assert graph(state) == {"a": 1, "other": "kept", "b": 2}
    assert state == {"a": 1, "other": "kept"}
    assert graph.run({"a": 1}, {}) == {"b": 2}


def test_models_are_bound_by_role():
    graph = Graph([double, apply.node(models={"net": "generator"})], inputs=("x",), optional=("bonus",), outputs=("z",))
    assert graph.ports == ("generator",)
    assert graph({"x": 1.0}, {"generator": lambda y: -y})["z"] == -2.0
    assert graph({"x": 1.0, "bonus": 5.0}, {"generator": lambda y: -y})["z"] == 3.0
    with pytest.raises(SpecError, match=r"the graph 'graph' needs models for \['generator'\], found \[\]"):
        graph({"x": 1.0})


def test_a_missing_input():
    graph = Graph([flow_target], inputs=("x0", "noise"), name="demo")
    with pytest.raises(ShapeError) as caught:
        graph({"x0": 1, "nois": 2})
    assert str(caught.value) == "the graph 'demo' needs ['noise'] in its state, found ['nois', 'x0']; did you mean 'nois'?"


def test_graphs_nest():
    inner = Graph([double, split.node(in_={"x": "y"})], inputs=("x",), outputs=("low", "y"), name="inner")
    outer = Graph(
        [inner.node(in_={"x": "start"}, out={"y": None}), double.node(in_={"x": "low"}, out={"y": "end"}, times=10.0)],
        inputs=("start",),
        outputs=("end",),
    )
    assert outer({"start": 3.0}) == {"start": 3.0, "end": 50.0}
    deeper = Graph([outer], inputs=("start",))
    assert deeper.run({"start": 3.0}, {}) == {"end": 50.0}
    bound = Graph([double, apply], inputs=("x",))
    assert Graph([bound.node(models={"net": "critic"})], inputs=("x",)).ports == ("critic",)
    assert Graph([bound.node(models={"net": "critic"})], inputs=("x",)).run({"x": 1}, {"critic": str}) == {"y": 2.0, "z": "2.0"}
    with pytest.raises(SpecError, match="inner has no result 'high'"):
        Graph([inner.node(out={"high": "h"})], inputs=("x",))


def test_grad_false_cuts_history():
    graph = Graph([double.node(grad=False), double.node(out={"y": "with_grad"})], inputs=("x",))
    out = graph({"x": torch.ones(2, requires_grad=True)})
    assert not out["y"].requires_grad
    assert out["with_grad"].requires_grad
    nested = Graph([Graph([double], inputs=("x",)).node(grad=False)], inputs=("x",))
    assert not nested({"x": torch.ones(2, requires_grad=True)})["y"].requires_grad
    assert torch.is_grad_enabled()


# Folds


def test_fold_carry_as_a_list_and_as_a_mapping():
    listed = Graph([Fold([accumulate], over="items", item="number", carry=("total",))], inputs=("items", "total"))
    assert listed.run({"items": (1, 2, 3), "total": 10}, {}) == {"total": 16}
    mapped = Graph(
        [Fold([accumulate], over="items", item="number", carry={"total": "start"}, collect={"total": "history"})],
        inputs=("items", "start"),
    )
    assert mapped.run({"items": (1, 2, 3), "start": 10}, {}) == {"total": 16, "history": (11, 13, 16)}
    assert mapped({"items": (), "start": 10}) == {"items": (), "start": 10, "total": 10, "history": ()}
    # A mapped carry may not land on a key that is there already.
    fold = Fold([accumulate], over="items", item="number", carry={"total": "start"})
    assert problems(fold, inputs=("items", "start", "total")) == [
        "fold writes 'total', which is already written @ $.nodes[0].out; rename it with out: {total: ...}"
    ]
    renamed = Graph([fold.node(out={"total": "sum"})], inputs=("items", "start", "total"))
    assert renamed.run({"items": (1, 2), "start": 0, "total": 99}, {}) == {"sum": 3}


def test_fold_reads_the_keys_around_it():
    body = [accumulate.node(in_={"number": "y"}), double.node(in_={"x": "number"}, times=3.0)]
    fold = Fold([body[1], body[0]], over="items", item="number", carry=("total",))
    assert fold.inputs == ("items", "total")
    assert Graph([fold], inputs=("items", "total")).run({"items": (1, 2), "total": 0}, {}) == {"total": 9.0}
    outside = Fold([accumulate.node(in_={"number": "step"})], over="items", item="number", carry=("total",))
    assert outside.inputs == ("items", "total", "step")
    assert Graph([outside], inputs=("items", "total", "step")).run({"items": (1, 2), "total": 0, "step": 5}, {}) == {
        "total": 10
    }


def test_fold_leaks_nothing_but_carry_and_collect():
    fold = Fold([double.node(in_={"x": "number"}), accumulate], over="items", item="number", carry=("total",))
    assert fold.outputs == ("total",)
    assert problems(fold, double.node(in_={"x": "y"}, out={"y": "w"}), inputs=("items", "total")) == [
        "double reads 'y', which nothing before it writes @ $.nodes[1].in.x; rename it with in: {x: ...}"
    ]


def test_a_turn_does_not_see_the_one_before():
    """`bonus` is written at the end of a turn; the next turn's optional input must not find it."""
    body = [
        apply.node(in_={"y": "number"}, out={"z": "seen"}),
        accumulate.node(in_={"number": "seen"}),
        double.node(in_={"x": "number"}, out={"y": "bonus"}),
    ]
    fold = Fold(body, over="items", item="number", carry=("total",), collect={"seen": "all"})
    graph = Graph([fold], inputs=("items", "total"))
    assert graph.run({"items": (1, 2), "total": 0}, {"net": lambda y: y}) == {"total": 3, "all": (1, 2)}


def test_folds_nest():
    inner = Fold([accumulate], over="row", item="number", carry=("total",))
    outer = Fold([inner], over="rows", item="row", carry=("total",), collect={"total": "sums"})
    graph = Graph([outer], inputs=("rows", "total"))
    assert graph.run({"rows": ((1, 2), (), (3,)), "total": 0}, {}) == {"total": 6, "sums": (3, 3, 6)}


def test_a_fold_may_be_renamed():
    fold = Fold([accumulate], over="items", item="number", carry=("total",))
    node = fold.node(in_={"items": "numbers", "total": "start"}, out={"total": "sum"})
    graph = Graph([node], inputs=("numbers", "start"))
    assert graph.run({"numbers": (1, 2), "start": 5}, {}) == {"sum": 8}
    over = fold.node(in_={"items": "numbers", "total": "sum"}, out={"total": "sum"})
    assert Graph([over], inputs=("numbers", "sum")).run({"numbers": (1, 2), "sum": 5}, {}) == {"sum": 8}
    assert problems(node, inputs=("items", "total")) == [
        "folds over 'numbers', which nothing before it writes @ $.nodes[0].fold.over",
        "carries 'start', which nothing before the fold writes @ $.nodes[0].fold.carry.total",
    ]
    assert problems(fold.node(in_={"total": "start"}), inputs=("items", "start", "total")) == [
        "fold writes 'total', which is already written @ $.nodes[0].out; rename it with out: {total: ...}"
    ]


def test_a_body_may_bind_its_carry_twice_in_a_turn():
    fold = Fold([accumulate, accumulate], over="items", item="number", carry=("total",))
    assert Graph([fold], inputs=("items", "total")).run({"items": (1, 2), "total": 0}, {}) == {"total": 6}


def test_rebind_allows_what_it_names():
    nodes = [double, double.node(in_={"x": "y"})]
    assert Graph(nodes, inputs=("x",), rebind=("y",)).run({"x": 1.0}, {}) == {"y": 4.0}
    assert len(problems(*nodes, rebind=("z",))) == 1


# Subgraphs


def test_subgraph_keeps_only_what_is_needed():
    fold = Fold([accumulate], over="items", item="number", carry={"total": "y"})
    graph = Graph(
        [double, split, fold, double.node(in_={"x": "low"}, out={"y": "last"})],
        inputs=("x", "items"),
        optional=("unused",),
    )
    assert [n.op.name for n in graph.subgraph(["total"]).nodes] == ["double", "fold"]
    assert graph.subgraph(["total"]).inputs == ("x", "items")
    small = graph.subgraph(["last"])
    assert ([n.op.name for n in small.nodes], small.inputs, small.outputs) == (["split", "double"], ("x",), ("last",))
    assert small.run({"x": 3.0}, {}) == {"last": 4.0}
    with pytest.raises(SpecError, match="the output 'nothing' is written by no node"):
        graph.subgraph(["nothing"])


def test_subgraph_follows_keys_that_are_bound_again():
    graph = Graph([double, double.node(in_={"x": "y"}), split], inputs=("x",), rebind=("y",))
    assert len(graph.subgraph(["y"]).nodes) == 2
    assert graph.subgraph(["y"]).run({"x": 1.0}, {}) == {"y": 4.0}


def test_subgraph_keeps_who_writes_an_optional_input():
    bonus = double.node(out={"y": "bonus"})
    graph = Graph([bonus, double, apply], inputs=("x",))
    assert graph.subgraph(["z"]).run({"x": 1.0}, {"net": lambda y: y}) == {"z": 4.0}


def test_subgraph_of_the_dmd_spec():
    graph = Graph.from_spec("specs/dmd_generator.yaml")
    assert graph.subgraph(["x0"]).ports == ("generator",)
    assert set(graph.subgraph(["loss"]).ports) == {"generator", "fake_score", "real_score"}


# Drawings


def test_drawings():
    inner = Graph([double, apply.node(models={"net": "generator"}, grad=False)], inputs=("x",), outputs=("z",), name="inner")
    fold = Fold([accumulate], over="items", item="number", carry={"total": "z"})
    graph = Graph(
        [inner, split.node(in_={"x": "z"}, out={"high": None}), fold], inputs=("x", "items"), optional=("bonus",), name="demo"
    )
    assert graph.to_tree().splitlines() == [
        "demo(x, items, bonus?)",
        "├─ inner [generator] -> z",
        "│  ├─ double(x) -> y",
        "│  └─ apply(y) [generator] -> z  (no grad)",
        "├─ split(z) -> low",
        "└─ for each number of items -> total",
        "   └─ accumulate(total, number) -> total",
        "-> z, low, total",
    ]
    drawing = graph.to_mermaid().splitlines()
    assert drawing[0] == "flowchart TD"
    for line in (
        "  in_x([x])",
        "  in_bonus([bonus])",
        '  subgraph n0["inner"]',
        '    n0_0["double"]',
        '    n0_1["apply<br/><i>generator</i>"]',
        "    n0_0 -- y --> n0_1",
        "  in_x -- x --> n0",
        "  n0 -- z --> n1",
        '  subgraph n2["for each number of items"]',
        "  n2 --> out_total([total])",
    ):
        assert line in drawing
    assert drawing.count("  end") == 2


def test_tree_shortens_long_options():
    graph = Graph([choose.node(mode="a", sizes=tuple(range(40)))], inputs=("x",))
    (line,) = [line for line in graph.to_tree().splitlines() if "choose" in line]
    assert line == "└─ choose(x) {mode: a, sizes: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11...} -> y"


@pytest.mark.parametrize(
    "name", ["rollout", "dmd_generator", "score_critic", "teacher_forcing", "flow_matching", "sample_ode", "ode_trajectory"]
)
def test_every_spec_draws(name):
    graph = Graph.from_spec(f"specs/{name}.yaml")
    tree, drawing = graph.to_tree(), graph.to_mermaid()
    for node in graph.nodes:
        assert node.op.name in tree or "for each" in tree
    assert drawing.count("subgraph ") == drawing.count("end\n") + drawing.endswith("end")
    assert all(f"out_{key}([{key}])" in drawing for key in graph.outputs)


# States


def test_tensordict_in_tensordict_out():
    graph = Graph([add_noise], inputs=("x0", "noise", "timestep"))
    state = TensorDict({"x0": torch.zeros(2, 3), "noise": torch.ones(2, 3), "timestep": torch.full((2, 3), 250.0)})
    state.set_non_tensor("steps", (1000, 750))
    before = state.clone()
    out = graph(state)
    assert isinstance(out, TensorDict)
    assert out.batch_size == torch.Size([])
    assert torch.equal(out["noisy"], interpolate(state["x0"], state["noise"], state["timestep"] / 1000))
    assert out["steps"] == (1000, 750)
    assert set(out.keys()) == {*state.keys(), "noisy"}
    assert "noisy" not in state.keys()  # noqa: SIM118 - a TensorDict iterates over its batch
    assert (state == before).all()
    assert out["x0"] is state["x0"]


def test_host_values_travel_as_non_tensor_data():
    graph = Graph([Fold([accumulate], over="items", item="number", carry=("total",))], inputs=("items", "total"))
    state = to_state({"items": (1, 2), "total": 5}, like=TensorDict())
    assert isinstance(state.get("items"), NonTensorData)
    out = graph(state)
    assert out["total"] == 8
    assert out["items"] == (1, 2)
    assert state["total"] == 5


def test_a_rollout_over_a_tensordict_equals_one_over_a_dict():
    from sftk.functional import Key, KVCache
    from sftk.functional.predict import toy_denoiser

    values = {
        "noise": torch.randn(2, 6, 4, 2, 2),
        "prompt_embeds": torch.randn(2, 3, 8),
        "key": Key(seed=0, samples=(0, 1)),
    }
    graph = Graph.from_spec("specs/rollout.yaml")
    plain = graph(values, {"denoiser": toy_denoiser})
    boxed = graph(to_state(values, like=TensorDict()), {"denoiser": toy_denoiser})
    assert torch.equal(plain["x0"], boxed["x0"])
    assert isinstance(boxed["cache"], KVCache)
    assert boxed["key"] == values["key"]
    assert boxed["exit_from"] == plain["exit_from"]


def test_any_mapping_is_a_state():
    class Frozen(Mapping):
        def __init__(self, values):
            self.values_ = values

        def __getitem__(self, key):
            return self.values_[key]

        def __iter__(self):
            return iter(self.values_)

        def __len__(self):
            return len(self.values_)

    assert Graph([double], inputs=("x",))(Frozen({"x": 2.0})) == {"x": 2.0, "y": 4.0}


def test_repr():
    assert repr(Graph([double], inputs=("x",), name="demo")) == "<graph demo: 1 nodes, x -> y>"
    assert repr(double) == "<transform double(x) -> y>"
