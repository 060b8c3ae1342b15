"""Turns of a step: which phases share a rollout, when, and what keeps them from it."""

from __future__ import annotations

import pytest

from sftk.core.graph import Graph
from sftk.core.inline import inlined
from sftk.core.transform import transform
from sftk.errors import SpecError
from sftk.spec.recipe import load_recipe
from sftk.spec.rollouts import find_rollout, matched
from sftk.spec.turns import cycle

SHARED = "share_rollout=true"


def names(recipe, *overrides):
    (stage,) = load_recipe(recipe, [SHARED, *overrides])
    return [turn.name for turn in stage.turns], cycle(stage.turns)


@pytest.mark.parametrize(("recipe", "taker"), [
    ("dmd", "critic"), ("sid", "critic"), ("gan", "discriminator"), ("dmd2", "critic"), ("f_distill", "critic"),
    ("dmd_long", "critic"), ("dmd_reward", "critic"),
])  # fmt: skip
def test_recipes_share_their_rollouts(recipe, taker):
    both = "phases.0.every=1", "phases.1.every=1"
    assert names(f"recipes/digits/{recipe}.yaml", *both) == (
        ["generator", f"{taker}.shared"], {"generator": 1, f"{taker}.shared": 1},
    )  # fmt: skip
    (stage,) = load_recipe(f"recipes/digits/{recipe}.yaml", [SHARED, *both])
    generator, shared = stage.turns
    assert "generator" not in shared.graph.ports
    assert set(shared.graph.outputs) == set(stage.graphs[taker].outputs)
    assert {source.removeprefix("generator.") for source in shared.phase.in_.values() if "." in source} <= set(
        generator.graph.outputs
    )
    assert not any(node.op.name.startswith("rollout") for node in shared.graph.nodes)


@pytest.mark.parametrize(("every", "other", "runs"), [
    (5, 1, {"generator": 1, "critic": 4, "critic.shared": 1}),
    (1, 5, {"generator": 5, "critic.shared": 1}),
    (2, 3, {"generator": 3, "critic": 1, "critic.shared": 1}),
    (2, 4, {"generator": 2, "critic.shared": 1}),
])  # fmt: skip
def test_a_phase_shares_on_the_steps_of_both(every, other, runs):
    overrides = f"phases.0.every={every}", f"phases.1.every={other}"
    assert names("recipes/dmd.yaml", *overrides)[1] == runs
    (stage,) = load_recipe("recipes/dmd.yaml", [SHARED, *overrides])
    for step in range(20):
        due = [turn.phase.name for turn in stage.turns if turn.due(step)]
        assert due == [phase.name for phase in stage.recipe.phases if step % phase.every == 0]
        shared = any(turn.shared for turn in stage.turns if turn.due(step))
        assert shared == (step % every == 0 and step % other == 0)


def test_without_the_option_every_phase_has_one_turn():
    (stage,) = load_recipe("recipes/dmd.yaml")
    assert [(turn.name, turn.graph is stage.graphs[turn.name]) for turn in stage.turns] == [
        ("generator", True),
        ("critic", True),
    ]


def problems(*overrides):
    with pytest.raises(SpecError) as caught:
        load_recipe("recipes/dmd.yaml", [SHARED, *overrides])
    return [str(problem) for problem in caught.value.problems]


def test_rollouts_that_differ_name_both_places():
    (shift, window) = problems("phases.critic.with.shift=5.0", "phases.generator.with.window=12")
    assert "'critic' rolls out with shift: 5.0, 'generator' with 3.0 (at $.phases[0].with.shift)" in shift
    assert "@ $.phases[1].with.shift (override 'phases.critic.with.shift=5.0')" in shift
    assert "window: None, 'generator' with 12 (at $.phases[0].with.window) @ $.phases[1].graph (recipes/dmd.yaml:" in window


def test_what_the_student_is_may_not_differ():
    (found,) = problems("models.other={size: digits}", "phases.critic.models={generator: other}")
    assert "no phase rolls a model out again" in found
    (found,) = problems("phases.critic.in={noise: latents}")
    assert "in.noise: latents, 'generator' with noise" in found


def test_options_that_concern_the_gradient_alone_may_differ():
    overrides = "phases.generator.with.grad_frames=6", "phases.generator.with.context_gradient=straight_through"
    assert names("recipes/dmd.yaml", *overrides)[0] == ["generator", "critic.shared"]


def test_a_recipe_without_a_second_rollout():
    with pytest.raises(SpecError, match=r"no phase rolls a model out again .* @ \$\.share_rollout"):
        load_recipe("recipes/digits/df.yaml", [SHARED])


def test_a_nested_rollout_is_found_and_read_like_a_plain_one():
    plain = find_rollout(Graph.from_spec("specs/score_critic.yaml"), {})
    nested = find_rollout(Graph.from_spec("specs/dmd_reward.yaml"), {})
    assert plain is not None
    assert nested is not None
    assert [node.op.name for node in nested.nodes] == ["dmd_generator"]
    one, other = matched(plain, nested)
    assert one is plain
    assert [node.op.name for node in other.nodes] == ["rollout"]
    assert other.names[0, "x0"] == "x0"
    assert other.graph.outputs == nested.graph.outputs


def test_an_inlined_graph_computes_what_the_nested_one_does(nothing_stays_registered):
    @transform(out=("sum", "difference"), kind="per_sample")
    def add_for_test(a, b=None):
        b = 0 if b is None else b
        return a + b, a - b

    first = add_for_test.node(in_={"a": "x", "b": "y"})
    second = add_for_test.node(in_={"a": "sum", "b": "difference"}, out={"sum": "twice", "difference": None})
    inner = Graph([first, second], inputs=("x",), optional=("y",), outputs=("twice", "difference"), name="inner")
    node = inner.node(in_={"x": "p", "y": "q"}, out={"twice": "sum", "difference": None})
    nested = Graph([node], inputs=("p",), optional=("q",), outputs=("sum",))
    flat = nested.with_nodes(inlined(node))
    for values in ({"p": 3, "q": 4}, {"p": 3}):
        assert flat.run(values, {}) == nested.run(values, {})
    assert [part.writes for part in flat.nodes] == [("inner.sum", "inner.difference"), ("sum",)]


def test_a_given_key_cuts_away_what_made_it(nothing_stays_registered):
    @transform(out=("a", "b"), kind="per_sample")
    def split_for_test(x):
        return x, x + 1

    @transform(out="y", kind="per_sample")
    def join_for_test(a, b, c=None):
        return a + b + (c or 0)

    graph = Graph([split_for_test, join_for_test], inputs=("x",), optional=("c",))
    cut = graph.subgraph(["y", "a"], given=["a", "b"])
    assert (cut.inputs, cut.optional, [node.op.name for node in cut.nodes]) == (("a", "b"), ("c",), ["join_for_test"])
    assert cut.run({"a": 1, "b": 5}, {}) == {"y": 6, "a": 1}
    with pytest.raises(SpecError, match="split_for_test writes 'a', which is already written"):
        graph.subgraph(["y"], given=["a"])
