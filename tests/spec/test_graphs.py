"""Specs read into graphs: parameters, nesting, places of mistakes in parameters that Python gives."""

from __future__ import annotations

import pytest
import torch

from sftk.core.fold import Fold
from sftk.core.graph import Graph
from sftk.errors import SpecError
from sftk.functional import add_noise, draw_noise, flow_target
from sftk.functional.keys import Key
from sftk.spec.graphs import load_graph, once
from sftk.spec.params import spec_params

SMALL = """\
doc: Noised latents and their flow.
inputs: [latents, timestep, key]
params: {name: noise, source: $name}
nodes:
  - {use: draw_noise, in: {like: latents}, with: {name: $source}}
  - {use: add_noise, in: {x0: latents}, grad: false}
  - {use: flow_target, in: {x0: latents}}
outputs: [noisy, target]
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def state():
    return {
        "latents": torch.ones(2, 3, 4, 2, 2, requires_grad=True),
        "timestep": torch.full((2, 3), 250.0),
        "key": Key(seed=3, samples=(0, 1)),
    }


def test_a_spec_is_the_graph_written_in_python(small):
    by_hand = Graph(
        [
            draw_noise.node(in_={"like": "latents"}, name="other"),
            add_noise.node(in_={"x0": "latents"}, grad=False),
            flow_target.node(in_={"x0": "latents"}),
        ],
        inputs=("latents", "timestep", "key"),
        outputs=("noisy", "target"),
    )
    read = load_graph(small, {"name": "other"}).run(state(), {})
    written = by_hand.run(state(), {})
    assert read.keys() == written.keys() == {"noisy", "target"}
    assert all(torch.equal(read[key], written[key]) for key in read)
    assert (read["noisy"].requires_grad, read["target"].requires_grad) == (False, True)
    assert not torch.equal(read["noisy"], load_graph(small).run(state(), {})["noisy"])


def test_a_parameter_may_stand_for_another(small):
    assert spec_params(small) == {"name": "noise", "source": "$name"}
    names = [
        load_graph(small, bound).nodes[0].options["name"]
        for bound in ({}, {"name": "a"}, {"source": "b"}, {"name": "a", "source": "b"})
    ]
    assert names == ["noise", "a", "b", "b"]


def test_from_spec_is_load_graph(small):
    assert Graph.from_spec(small, name="x").to_tree() == load_graph(small, {"name": "x"}).to_tree()
    assert Graph.from_spec(small).doc == "Noised latents and their flow."


def test_parameters_from_python_are_blamed_by_name(small):
    with pytest.raises(SpecError) as caught:
        Graph.from_spec(small, name=3, nam="x")
    assert [str(problem) for problem in caught.value.problems] == [
        f"{small} has no parameter 'nam' @ $.nam (parameters); did you mean 'name'?",
        "the option 'name' of draw_noise takes a string, found the integer 3 @ $.name (parameters)",
    ]


def test_frames_are_checked_where_they_are_known():
    assert load_graph("specs/rollout.yaml", {"frames_per_block": 4}).outputs[0] == "x0"
    with pytest.raises(
        SpecError, match=r"21 frames do not divide into blocks of 4; take 20 or 24 frames @ \$.frames_per_block"
    ):
        load_graph("specs/rollout.yaml", {"frames_per_block": 4}, frames=21)


def test_a_wrong_value_is_reported_once_however_many_nodes_read_it():
    with pytest.raises(SpecError) as caught:
        load_graph("specs/dmd_generator.yaml", {"shift": "5", "window": 2, "sink": 4})
    assert [problem.path for problem in caught.value.problems] == [("shift",), ("window",)]
    assert once(caught.value.problems * 2) == list(caught.value.problems)


def test_the_rollout_is_a_fold_of_folds():
    graph = load_graph("specs/rollout.yaml")
    given, blocks = (node.op for node in graph.nodes if isinstance(node.op, Fold))
    assert (given.over, blocks.over, blocks.outputs) == ("given_blocks", "blocks", ("cache", "x0_blocks"))
    assert [node.op.over for node in blocks.nodes if isinstance(node.op, Fold)] == ["lead"]
    assert graph.ports == ("denoiser",)


def test_every_shipped_spec_builds():
    from sftk.spec.files import package_root

    names = sorted(path.name for path in (package_root() / "specs").glob("*.yaml"))
    assert len(names) >= 6
    for name in names:
        graph = load_graph(f"specs/{name}")
        assert graph.doc
        assert graph.to_mermaid().startswith("flowchart")


INNER = """\
doc: Noise.
inputs: [latents, key]
params: {name: noise, second: $name}
nodes:
  - {use: draw_noise, in: {like: latents}, with: {name: $name}}
  - {use: draw_noise, in: {like: latents}, with: {name: $second}, out: {noise: other}}
outputs: [noise, other]
"""
OUTER = """\
doc: The same from outside.
inputs: [latents, key]
params_of: [inner.yaml]
nodes:
  - {use: inner.yaml, with: $params}
outputs: [noise, other]
"""


def draws(path, **params):
    found = load_graph(path, params).run({"latents": torch.zeros(1, 4), "key": Key(seed=3)}, {})
    return found["noise"], found["other"]


def test_params_of_takes_over_names_and_defaults(tmp_path):
    (tmp_path / "inner.yaml").write_text(INNER)
    path = tmp_path / "outer.yaml"
    path.write_text(OUTER)
    assert spec_params(path) == {"name": "noise", "second": "$name"}
    first, second = draws(path)
    assert torch.equal(first, second)
    assert torch.equal(draws(path, second="x")[1], draws(tmp_path / "inner.yaml", second="x")[1])
    path.write_text(OUTER.replace("params_of:", "params: {name: mine}\nparams_of:"))
    assert spec_params(path) == {"name": "mine", "second": "$name"}
    mine, same = draws(path)
    assert torch.equal(mine, same)
    assert not torch.equal(mine, first)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("with: $params", "with: {}", "$.params_of (outer.yaml:3): the parameter 'second' is never used"),
        ("[inner.yaml]", "[inner.yaml, other.yaml]", "$.params_of[1] (outer.yaml:3): 'name' is 'noise' in inner.yaml and"),
        ("[inner.yaml]", "[iner.yaml]", "$.params_of[0] (outer.yaml:3): no such file 'iner.yaml'"),
        ("[inner.yaml]", "[outer.yaml]", "$.params_of[0] (outer.yaml:3): specs take parameters from each other in a circle"),
        ("{use: inner.yaml,", "{use: draw_noise,", "$.nodes[0] (outer.yaml:5): `with: $params` is for a node that uses a spec"),
        ("with: $params", "with: $param", '$.nodes[0].with (outer.yaml:5): expected a mapping or "$params"'),
    ],
)
def test_params_of_says_what_is_wrong(tmp_path, monkeypatch, old, new, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner.yaml").write_text(INNER)
    (tmp_path / "other.yaml").write_text(INNER.replace("name: noise", "name: different"))
    (tmp_path / "outer.yaml").write_text(OUTER.replace(old, new))
    with pytest.raises(SpecError) as caught:
        load_graph("outer.yaml")
    path, _, rest = said.partition(" (")
    place, _, message = rest.partition("): ")
    found = [str(problem) for problem in caught.value.problems]
    assert any(f"@ {path} ({place})" in text and message in text for text in found), found
